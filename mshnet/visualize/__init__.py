"""The report's pictures: episodes with their masks, energy maps, charts.

Pillow and NumPy draw the episodes; matplotlib draws the charts through its object interface, so that no
process-wide state is touched and any thread may call these.
"""

from mshnet.visualize.charts import Measured, class_bars, interval_chart, learning_curves, size_bars
from mshnet.visualize.energy import energy_picture
from mshnet.visualize.figures import episode_figure
from mshnet.visualize.panels import Shown, episode_panel, foreground_iou, overlay
from mshnet.visualize.style import png_bytes

__all__ = [
    "Measured",
    "Shown",
    "class_bars",
    "energy_picture",
    "episode_figure",
    "episode_panel",
    "foreground_iou",
    "interval_chart",
    "learning_curves",
    "overlay",
    "png_bytes",
    "size_bars",
]
