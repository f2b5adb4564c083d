"""The command line as a user meets it: exit codes, sentences, nothing half-written."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock
from tests.db.conftest import file_of
from tests.tuner.test_search import study
from typer.main import get_command
from typer.testing import CliRunner

from ditune.cli.main import app, main
from ditune.cli.run import _arguments_of, _options
from ditune.db.errors import DituneError
from ditune.db.policy import MaskCache, Payload, Policy
from ditune.db.records import SearchFigures, Study
from ditune.db.store import Store

ROOT = Path(__file__).resolve().parents[2]
NOW = "2026-01-01T00:00:00Z"
runner = CliRunner()


@pytest.fixture(autouse=True)
def own_database(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("DITUNE_DB", str(tmp_path / "default.db"))
    monkeypatch.chdir(tmp_path)  # where results go by default
    yield


def tune(
    *arguments: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> tuple[int, str, str]:
    """Run `tune` through its real edge; returns exit code, standard output, standard error."""
    monkeypatch.setattr("sys.argv", ["tune", *arguments])
    with pytest.raises(SystemExit) as stopped:
        main()
        raise SystemExit(0)
    seen = capsys.readouterr()
    code = stopped.value.code
    return (0 if code is None else int(code)), seen.out, re.sub(r"\s+", " ", seen.err)


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Any:
    def call(*arguments: str) -> tuple[int, str, str]:
        return tune(*arguments, capsys=capsys, monkeypatch=monkeypatch)

    return call


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["run"], "say what to tune"),
        (["run", "model", "--miniature"], "say what to tune"),
        (["run", "/nowhere/model"], "needs prompts"),
        (["run", "/nowhere/model", "--prompts", "{prompts}"], "no model folder at /nowhere/model"),
        (["run", "{folder}", "--prompts", "{prompts}"], "no model_index.json"),
        (["run", "{folder}", "--prompts", "{empty}"], "is empty"),
        (["run", "{folder}", "--prompts", "/nowhere.txt"], "cannot read the prompt file"),
        (["run", "--miniature", "--prompts", "{prompts}"], "brings its own prompts"),
        (["run", "--miniature", "--quality", "beauty>=1"], "unknown metric 'beauty'"),
        (["run", "--miniature", "--quality", "psnr=35"], "METRIC>=NUMBER"),
        (["run", "--miniature", "--tiers", "high;mine"], "the tier 'mine' needs floors"),
        (["run", "--miniature", "--tiers", "high", "--quality", "psnr>=35"], "exclude each other"),
        (["run", "--miniature", "--out", "{file}/out"], "cannot write the report"),
        (["run", "--miniature", "--out", "{out}", "--db", "{file}/x.db"], "{file}"),
        (["run", "--resume", "study-none"], "no study 'study-none'"),
        (["policy", "verify", "/nowhere.json"], "/nowhere.json cannot be read"),
        (["policy", "show", "abc"], "tune policy list"),
        (["policy", "import", "/nowhere.json", "--tier", "a b"], "'a b' is no name of a tier"),
        (["report"], "holds no study yet"),
        (["bench"], "say what to tune"),
        (["bench", "--miniature", "--quality", "beauty>=1"], "unknown metric 'beauty'"),
        (["bench", "--miniature", "--peers", "TeaCash"], "unknown peers ['TeaCash']"),
        (["bench", "--miniature", "--out", "{file}/out"], "cannot write the measurements"),
    ],
)
def test_what_the_caller_must_correct_is_one_sentence_and_exit_2(
    command: Any, tmp_path: Path, arguments: list[str], says: str
) -> None:
    places = {
        "prompts": tmp_path / "prompts.txt",
        "empty": tmp_path / "empty.txt",
        "folder": tmp_path / "folder",
        "file": tmp_path / "file",
        "out": tmp_path / "out",
    }
    places["prompts"].write_text("\n".join(f"prompt {i}" for i in range(9)))
    places["empty"].write_text("\n \n")
    places["folder"].mkdir()
    places["file"].write_text("in the way")
    code, out, err = command(*(argument.format(**places) for argument in arguments))
    assert code == 2, err
    assert says.format(**places) in err
    assert "Traceback" not in err
    assert out == ""
    assert not list(tmp_path.rglob("*.html"))
    assert not list(tmp_path.rglob("policy.json"))
    assert not (tmp_path / "ditune-out").exists()


def test_a_model_with_too_few_prompts_is_refused(command: Any, tmp_path: Path) -> None:
    folder, prompts = tmp_path / "model", tmp_path / "prompts.txt"
    folder.mkdir()
    (folder / "model_index.json").write_text("{}")
    prompts.write_text("one\ntwo\n")
    code, _, err = command("run", str(folder), "--prompts", str(prompts))
    assert (code, "at least 8 prompts" in err) == (2, True)


def test_a_folder_that_is_no_pipeline_is_refused(command: Any, tmp_path: Path) -> None:
    folder, prompts = tmp_path / "model", tmp_path / "prompts.txt"
    folder.mkdir()
    (folder / "model_index.json").write_text('{"_class_name": "NoSuchPipeline"}')
    prompts.write_text("\n".join(f"prompt {i}" for i in range(9)))
    code, _, err = command("run", str(folder), "--prompts", str(prompts))
    assert (code, "cannot load a pipeline" in err) == (2, True)


def test_usage_errors_exit_2(command: Any) -> None:
    assert command("run", "--no-such-option")[0] == 2
    assert command("run", "--miniature", "--trials", "0")[0] == 2


def test_two_runs_never_write_to_one_folder(command: Any, tmp_path: Path) -> None:
    with FileLock(tmp_path / ".ditune.lock"):
        code, out, err = command("run", "--miniature", "--out", str(tmp_path))
    assert (code, out) == (2, "")
    assert "another tune run is writing to" in err


def test_a_damaged_policy_file_exits_6(command: Any, tmp_path: Path) -> None:
    damaged = tmp_path / "policy.json"
    damaged.write_text('{"schema_version": 1}')
    code, _, err = command("policy", "verify", str(damaged))
    assert code == 6
    assert str(damaged) in err.replace(" ", "")


def test_a_damaged_database_exits_6(command: Any, tmp_path: Path) -> None:
    damaged = tmp_path / "damaged.db"
    damaged.write_bytes(b"this is no database" * 400)
    assert command("db", "check", "--db", str(damaged))[0] == 6
    assert command("policy", "list", "--db", str(damaged))[0] == 6


def test_an_empty_database_lists_nothing(command: Any) -> None:
    assert (
        command("policy", "list")[0],
        "no policies yet" in command("policy", "list")[1],
    ) == (0, True)
    code, out, _ = command("policy", "list", "--json")
    assert json.loads(out) == {"schema": "ditune/policies-1", "policies": []}
    code, out, _ = command("db", "check", "--json")
    assert (code, json.loads(out)["policies"]) == (0, 0)


def test_backup_and_upgrade(command: Any, tmp_path: Path) -> None:
    command("db", "check")
    assert command("db", "backup", str(tmp_path / "copy.db"))[0] == 0
    assert command("db", "upgrade", "--db", str(tmp_path / "copy.db"))[0] == 0
    assert command("db", "check", "--db", str(tmp_path / "copy.db"))[0] == 0


def test_doctor_prints_the_fingerprint(command: Any) -> None:
    code, out, _ = command("doctor", "--json")
    seen = json.loads(out)
    assert code == (5 if seen["findings"] else 0)
    assert seen["hardware"]["kind"] == "cpu" or seen["hardware"]["kind"] == "cuda"
    assert seen["software"]["torch"]
    assert command("doctor")[0] == code


def test_doctor_says_what_keeps_two_models_apart(command: Any, tmp_path: Path) -> None:
    for name, layers, patch in (("large", 4, 2), ("small", 2, 2), ("other", 2, 1)):
        config = {"num_layers": layers, "num_attention_heads": 2, "attention_head_dim": 8}
        (tmp_path / name / "transformer").mkdir(parents=True)
        text = json.dumps(config | {"patch_size": patch})
        (tmp_path / name / "transformer" / "config.json").write_text(text)
    large, small, other = (str(tmp_path / name) for name in ("large", "small", "other"))

    def said(*pair: str) -> list[str]:
        findings = json.loads(command("doctor", "--json", "--pair", *pair)[1])["findings"]
        return [each for each in findings if "cannot take over" in each]

    assert not said(large, small)
    assert json.loads(command("doctor", "--json", "--pair", large, small)[1])["pair"] == {
        "fits": True,
        "not_compared": ["vae", "scheduler"],
        "converted": [],
        "weight_bytes": None,  # there are no weights in the folders
    }
    for name, size in (("large", 3), ("small", 1)):
        weights = tmp_path / name / "transformer" / "diffusion_pytorch_model.safetensors"
        weights.write_bytes(bytes(size))
    seen = json.loads(command("doctor", "--json", "--pair", large, small)[1])["pair"]
    assert seen["weight_bytes"]["swap"] == {"before": 3, "after": 1}
    shown = command("doctor", "--pair", large, small)[1]
    assert 'offload="swap": weights' in shown
    assert "not compared: vae and scheduler" in shown
    assert "transformer.patch_size: 2 against 1" in said(large, other)[0]
    assert "transformer size" in said(small, large)[0]
    assert command("doctor", "--pair", large, str(tmp_path))[0] == 2


def test_version(command: Any) -> None:
    from ditune import __version__

    assert (0, f"ditune {__version__}\n") == command("--version")[:2]


def commands(group: Any, path: tuple[str, ...] = ()) -> Iterator[list[str]]:
    yield list(path)
    for name, command in getattr(group, "commands", {}).items():
        yield from commands(command, (*path, name))


@pytest.mark.parametrize("arguments", list(commands(get_command(app))), ids=" ".join)
def test_every_command_has_help(arguments: list[str]) -> None:
    shown = runner.invoke(app, [*arguments, "--help"])
    assert shown.exit_code == 0
    assert "Usage" in shown.output
    first = shown.output.split("Usage", 1)[1].splitlines()[2:]
    assert any(
        line.strip(" │").endswith((".", "(exit 6 if it is damaged).", ").")) for line in first
    )


def test_every_error_has_an_exit_code_of_the_contract() -> None:
    def tree(kind: type[DituneError]) -> Iterator[type[DituneError]]:
        yield kind
        for child in kind.__subclasses__():
            yield from tree(child)

    assert {kind.exit_code for kind in tree(DituneError)} <= {1, 2, 3, 4, 5, 6, 130}


def test_help_loads_nothing_heavy() -> None:
    heavy = "{'torch', 'diffusers', 'optuna', 'sqlalchemy'}"
    code = f"import sys, ditune.cli.main; print(*{heavy} & set(sys.modules))"
    env = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    seen = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env
    )
    assert seen.stdout.strip() == ""


def stored(policy: Policy) -> str:
    """Put a policy into the default database; return its id."""
    found = file_of(policy)
    with Store.open(os.environ["DITUNE_DB"]) as store:
        store.save_and_activate(found)
    return found.policy_id


def test_what_a_search_saw_is_shown_apart_from_what_is_proved(command: Any) -> None:
    kept = stored(Policy(cache=MaskCache(actions=("full", "full", "step", "full"))))
    code, out, err = command("policy", "show", kept)
    assert (code, json.loads(out)["evidence"]["search"], err) == (0, None, "")
    seen = SearchFigures(trials=20, prompts=0, pairs=0, speedup=None, quality={})
    with Store.open(os.environ["DITUNE_DB"]) as store:
        found = store.policy(kept)
        evidence = found.evidence.model_copy(update={"search": seen})
        store.save_policy(found.model_copy(update={"evidence": evidence}))
    code, out, err = command("policy", "show", kept)
    assert json.loads(out)["evidence"]["search"]["trials"] == 20
    assert "evidence.search is no proof. The search tried 20 policies and never this one" in err


def test_a_resumed_study_keeps_to_a_cold_start(command: Any, tmp_path: Path) -> None:
    for name, given in (("cold", {"no_warm_start": "True"}), ("warm", {})):
        settings = study().settings.model_copy(update={"seed": len(name) + len(given)})
        begun = Study(
            name=settings.study, settings=settings, created_at=NOW, arguments={"out": name, **given}
        )
        with Store.open(os.environ["DITUNE_DB"]) as store:
            store.save_study(begun)
        asked = _arguments_of(begun.name, None)
        assert _options(asked | {"trials": 20, "seed": 0}).warm_start == (name == "warm")


def test_a_policy_is_written_for_the_tools_that_can_do_the_same(
    command: Any, tmp_path: Path
) -> None:
    blocks = MaskCache(actions=("full", "full", "block", "full"), payload=Payload(order=0))
    kept = stored(Policy(cache=blocks))
    assert command("policy", "export", kept, "ours.json")[0] == 0
    assert json.loads(Path("ours.json").read_text())["policy_id"] == kept
    assert command("policy", "export", kept, "theirs.yaml", "--to", "cache-dit")[0] == 0
    assert "steps_computation_mask: [1, 1, 0, 1]" in Path("theirs.yaml").read_text()
    code, _, said = command("policy", "export", kept, "theirs.py", "--to", "diffusers")
    assert code == 2
    assert "cannot be written for diffusers: only TaylorSeer follows a list" in said
    assert not Path("theirs.py").exists()
