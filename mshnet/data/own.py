"""Where one's own labelled pictures lie. Importing this loads neither torch nor numpy."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class OwnData:
    """Beside `--dataset` coco-json, voc and fss: which files there are, and which of their classes take part."""

    images: str = ""
    """Folder or URI of the pictures; of fss, of the classes' folders."""
    annotations: str = ""
    """coco-json: the JSON file of images, annotations and categories."""
    masks: str = ""
    """voc: folder or URI of label PNGs, named as their pictures."""
    class_list: str = ""
    """voc: a text file with a class name a line, the first that of label 1."""
    classes: str = ""
    """A JSON file that merges classes, leaves some out or gives the folds; empty: all as they are, folds by rule."""
    fold_count: int = 4
    """Into how many folds the rule divides the classes."""
    fold_seed: int = 0
    """Of the rule's draws."""
    data_name: str = ""
    """Of the data set, in the names of runs and registered models; empty: the dataset's."""
