"""`tune moe` from end to end on tiny layers: what it refuses, what it prints, what it stores."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.cli.test_commands import command, own_database
from tests.kernels.adapters.models import MODELS
from typer.testing import CliRunner

import ditune
from ditune.accel import fingerprint
from ditune.cli.main import app
from ditune.cli.moe import _words
from ditune.db.moe import CpuTiles, LayerTiles, MoeShape, TileConfig
from ditune.db.store import Store
from ditune.db.tunings import TunedLayer
from ditune.kernels.hardware import GPUS, any_device

__all__ = ["command", "own_database"]  # the fixtures
TINY = MoeShape(experts=4, hidden=32, inner=16, top_k=2, dtype="float32")
SHAPE = ("--shape", "4,32,16,2")


def stored(database: Path, hardware: Any) -> list[TunedLayer]:
    with Store.open(str(database)) as store:
        return store.moe.of(hardware)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "say what to tune: a MODEL, or --shape EXPERTS,HIDDEN,INNER,TOP_K; neither was given"),
        (["model", *SHAPE], "both were given, model and 4,32,16,2"),
        (["no such/model"], "no such/model is neither a folder here nor a model"),
        (["--shape", "4,32,16"], "--shape 4,32,16 must be four whole numbers > 0"),
        (["--shape", "4,32,16,0"], "--shape 4,32,16,0 must be four whole numbers > 0"),
        (["--shape", "4,32,16,²"], "such as 64,2048,1408,6"),
        (["--shape", "4,32,16,5"], "5 different experts of 4; give at most 4 as TOP_K"),
        ([*SHAPE, "--dtype", "int8"], "int8 is unknown; use one of float32, bfloat16, float16"),
        ([*SHAPE, "--routing", "chaos"], "--routing chaos is unknown; use one of balanced, zipf"),
        ([*SHAPE, "--for", "h100", "--device", "cpu"], "--device one here: give one"),
        ([*SHAPE, "--for", "gtx480"], "no GPU named 'gtx480'; it knows a100, h100"),
        ([*SHAPE, "--device", "toaster"], "--device toaster: Expected one of cpu, cuda"),
        ([*SHAPE, "--device", "meta"], "kernels run on cpu and cuda, not on meta"),
        ([*SHAPE, "--routings", "{real}", "--tokens", "16"], "leave --tokens and --routing out"),
        ([*SHAPE, "--routings", "{real}", "--routing", "best"], "--routings has its own tokens"),
        ([*SHAPE, "--routings", "nowhere.json"], "cannot read routings from nowhere.json"),
        ([*SHAPE, "--routings", "{wrong}"], "routing 'one' must be 4 whole numbers >= 0"),
    ],
)
def test_what_cannot_be_tuned_is_one_sentence_and_exit_2(
    command: Any, tmp_path: Path, arguments: list[str], says: str
) -> None:
    places = {name: tmp_path / f"{name}.json" for name in ("real", "wrong")}
    places["real"].write_text('{"one": [8, 8, 8, 8]}')
    places["wrong"].write_text('{"one": [8, 8]}')
    code, out, err = command("moe", *(argument.format(**places) for argument in arguments))
    assert (code, out) == (2, "")
    assert says in err
    assert "Traceback" not in err


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a CUDA device")
def test_a_gpu_that_is_not_here_is_refused_with_the_way_to_predict(command: Any) -> None:
    code, _, err = command("moe", *SHAPE, "--device", "cuda")
    assert (code, "this machine has no CUDA device; --for predicts" in err) == (2, True)


def test_every_routing_that_there_is_stands_in_the_help() -> None:
    shown = CliRunner().invoke(app, ["moe", "--help"], env={"COLUMNS": "200"}).output
    assert "balanced, zipf, best, worst or hole (default: the first two)" in shown
    assert '{"name": [rows, ...]}' in shown


def test_what_was_tuned_for_a_shape_is_printed_and_stored(command: Any, tmp_path: Path) -> None:
    database = tmp_path / "own.db"
    asked = ("--tokens", "16", "--tokens", "64", "--device", "cpu", "--db", str(database))
    code, out, err = command("moe", *SHAPE, *asked, "--json")
    assert (code, err) == (0, "")
    found = json.loads(out)
    here = fingerprint.hardware(torch.device("cpu"))
    assert found["schema"] == "ditune/moe-1"
    assert found["hardware"] == here.model_dump(mode="json")
    (layer,) = found["layers"]
    assert (layer["count"], layer["shape"]) == (1, TINY.model_dump())
    names = [f"{kind}, {tokens} tokens" for tokens in (16, 64) for kind in ("balanced", "zipf")]
    assert [row.pop("routings") for row in layer["found"]] == [[name] for name in names]
    for row in layer["found"]:
        assert row.pop("us") > 0.0
        assert "tilings tried; CPU time of " in row.pop("note")
    (kept,) = stored(database, here)
    assert layer["found"] == [choice.model_dump(mode="json") for choice in kept.tuning.choices]
    assert {choice.status for choice in kept.tuning.choices} == {"measured"}
    assert (kept.tuning.shape, kept.tuning.default) == (TINY, CpuTiles())
    assert not (tmp_path / "default.db").exists()


def test_a_table_shows_recorded_routings_and_the_model_takes_their_tiles(
    command: Any, tmp_path: Path
) -> None:
    qwen = MODELS["qwen"]
    model: Any = qwen.build()
    model.config.save_pretrained(tmp_path / "model")
    routings = tmp_path / "routings.json"
    routings.write_text('{"step 1": [4, 4, 4, 4, 4, 4, 4, 4], "step 9": [5, 3, 4, 4, 4, 4, 4, 4]}')
    asked = ("--routings", str(routings), "--device", "cpu", "--db", str(tmp_path / "own.db"))
    code, out, _ = command("moe", str(tmp_path / "model"), *asked)
    assert code == 0
    assert out.startswith("2 x 8 experts of 32 to 24, 2 per token, float32 on ")
    assert re.search(r"step 1 .* \d+ │ +\d\.\d\dx │ measured", out)  # the two share a bucket
    assert re.search(r"step 9 +│", out)
    assert "tilings tried; CPU time of " in out
    with ditune.accelerate_experts(model, db=tmp_path / "own.db") as applied:
        assert [layer.tuned for layer in applied.summary().layers] == [True, True]


@pytest.mark.slow
def test_tiles_for_a_gpu_that_is_elsewhere_are_compiled_and_hold_for_any_of_its_kind(
    command: Any, tmp_path: Path
) -> None:
    database = tmp_path / "own.db"
    asked = ("--for", "A100", "--tokens", "16", "--routing", "balanced", "--db", str(database))
    code, out, err = command("moe", "--shape", "4,32,32,2", *asked)
    assert code == 0, err
    assert out.startswith("1 x 4 experts of 32 to 32, 2 per token, bfloat16 on any a100")
    assert re.search(r"balanced, 16 tokens +│ up +\d+x\d+x\d+, \d warps.*│ compiled", out)
    assert re.search(r"│ down +\d+x\d+x\d+", out)
    assert re.search(r"\d+ after grid, .*after kept", out.replace("\n", " "))
    (kept,) = stored(database, any_device(GPUS["a100"]))
    (choice,) = kept.tuning.choices
    assert (choice.status, choice.bucket.tokens) == ("compiled", 16)
    assert isinstance(choice.tiles, LayerTiles)


def test_what_is_unusual_of_tiles_is_said() -> None:
    every = TileConfig(path="tma", low_m=16, swap_ab=True, split_k=2, persistent=1)
    plain, unusual = _words(LayerTiles(down=every))
    assert plain == "up   128x128x64, 8 warps, 3 stages, ptr, group 8"
    assert unusual.endswith("tma, group 8, low 16, swapped, split 2, stays")
    assert list(_words(CpuTiles())) == ["256 rows, desc, dynamic, fused"]
    assert list(_words(CpuTiles(fused=False, prepacked=True))) == [
        "256 rows, desc, dynamic, prepacked"
    ]
