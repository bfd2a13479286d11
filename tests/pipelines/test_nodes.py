"""Looking at nodes: each kind of trouble by itself, and several nodes' in one message."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import ray

from mshnet.data.shapes import write_voc
from mshnet.errors import InputError
from pipelines import environment, nodes
from pipelines.cluster import connected
from pipelines.config import ComputeConfig, CrossValidationConfig
from pipelines.nodes import Demands, look
from tests.object_store import free_port


@pytest.fixture
def config(tmp_path: Path) -> CrossValidationConfig:
    """A small source and a store of this machine; other versions are let be."""
    write_voc(tmp_path / "shapes", images=4, size_px=48, seed=0)
    (tmp_path / "store").mkdir()
    return CrossValidationConfig(
        dataset="shapes",
        source=str(tmp_path / "shapes"),
        store=str(tmp_path / "store"),
        tracking_uri=f"sqlite:///{tmp_path}/tracker/mlflow.db",
        backbone_weights="random",
        compute=ComputeConfig(any_versions=True),
    )


def demands(config: CrossValidationConfig, **changes: Any) -> Demands:
    given: dict[str, Any] = {"config": config, "lock": "", "code": "", "trains": True, "marks": ()}
    return Demands(**given | changes)


def test_a_node_that_has_all_is_let_be(config: CrossValidationConfig) -> None:
    lock = environment.lock()
    assert environment.differences(lock) == (), "this environment is not the lock's: make setup"
    assert look(demands(config, lock=lock, code=environment.identity(lock))) == []


def test_other_packages_and_other_code_are_all_that_is_said(config: CrossValidationConfig) -> None:
    config = replace(config, source="/nowhere")
    lock = "torch==0.1.2"
    (problem,) = look(demands(config, lock=lock, code=environment.identity(lock)))
    assert problem.startswith("expected the packages of requirements.lock, found torch ")
    (problem,) = look(demands(config, lock=lock, code="0" * 12))
    assert problem.startswith("expected the code and the Python of the job's driver, found others; run `make setup`")
    assert any("/nowhere" in problem for problem in look(demands(config)))


def test_a_folder_that_only_the_driver_has(config: CrossValidationConfig, tmp_path: Path) -> None:
    """As another machine sees it: its folder of the same name, if any, has no such mark."""
    with nodes._marked(config, trains=True) as marks:
        assert look(demands(config, marks=marks)) == []
        assert len(marks) == 2
        elsewhere = tuple((uri.replace("/.nodes", "/elsewhere/.nodes"), *words) for uri, *words in marks)
        first, second = look(demands(config, marks=elsewhere))
    assert first == (
        f"expected the store '{tmp_path}/store' to be a place that all nodes reach, found another one or none here; "
        "give one such as s3://BUCKET/store, or a folder that is mounted on all of them"
    )
    assert second.startswith(f"expected the tracker sqlite:///{tmp_path}/tracker/mlflow.db to be a file that all nodes")
    assert "set MLFLOW_TRACKING_URI to its address" in second
    assert not list(tmp_path.rglob(".nodes-*"))
    assert not (tmp_path / "store" / "elsewhere").exists(), "looking makes no folder"


def test_everything_that_is_missing_is_said_at_once(config: CrossValidationConfig, tmp_path: Path) -> None:
    tracker = f"http://127.0.0.1:{free_port()}"
    config = replace(config, tracking_uri=tracker, source=str(tmp_path / "gone"), split_lists=str(tmp_path / "lists"))
    problems = look(demands(config))
    assert len(problems) == 2
    assert f"expected a tracking server at '{tracker}', found none that answers" in problems[0]
    assert "gone" in problems[1]
    config = replace(config, source=str(tmp_path / "shapes"))
    assert f"expected split lists at '{tmp_path / 'lists'}', found nothing there" in look(demands(config))[1]


@pytest.mark.cluster
def test_all_nodes_are_asked_and_the_message_names_them(
    config: CrossValidationConfig, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.INFO)
    with connected():
        (address,) = {node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]}
        nodes.check(config, trains=True)
        assert f"1 node(s) looked at: {address}" in caplog.text
        config = replace(config, compute=ComputeConfig())
        monkeypatch.setattr(environment, "lock", lambda: "torch==0.1.2")
        with pytest.raises(InputError) as caught:
            nodes.check(config, trains=True)
    assert str(caught.value).startswith(
        f"1 of 1 node(s) cannot take part:\n  {address}: expected the packages of requirements.lock, found torch"
    )
