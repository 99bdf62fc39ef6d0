"""Overrides: unknown keys are refused, text stays as it is typed, and what cannot be read is answered with what can."""

from __future__ import annotations

from pathlib import Path

import pytest

from sepllm_train.base.errors import UserError
from sepllm_train.cli.main import main
from sepllm_train.config.load import configuration_of
from sepllm_train.config.overrides import literal, settled
from sepllm_train.config.schema import Config
from sepllm_train.suite.config import SuiteSettings
from sepllm_train.training import requeue


@pytest.mark.parametrize("sign", ["", "+", "++"])
@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("training.stepz=99", "there is no key training.stepz (did you mean training.steps?)"),
        ("optim.learning_rate=5", "there is no key optim.learning_rate (did you mean optim.lr?)"),
        ("steps=99", "there is no key steps (did you mean training.steps?)"),
        ("model.layers.deep=1", "model.layers"),
        ("foo={bar: 1}", "there is no key foo"),
    ],
)
def test_a_key_that_nothing_reads_is_refused(sign: str, override: str, words: str) -> None:
    with pytest.raises(UserError) as refused:
        configuration_of([sign + override])
    assert words in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (["pretrain", "+training.stepz=9"], "no key training.stepz"),
        (["pretrain", "+training.stepz=9", "--cfg", "job"], "no key training.stepz"),
        (["pretrain", "--nproc", "2", "++foo=1"], "no key foo"),
        (["pretrain", "~training"], "keys cannot be taken away"),
        (["pretrain", "+hydra.job.env_set.X=1"], "takes no keys"),
        (["suite", "+suite=paper", "+suite.sizes=cpu"], "no key suite.sizes"),
        (["suite", "+suite=paper", "++sizes.toy.stepz=3"], "no key sizes.toy.stepz"),
        (["match", "interval", "+training.stepz=9"], "no key training.stepz"),
    ],
)
def test_every_command_that_takes_overrides_refuses_them(
    command: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command) == 2
    output, errors = capsys.readouterr()
    assert words in errors and errors.startswith("error: ") and errors.count("\n") == 1 and not output


TYPED = (
    "2024_01_15", "3.10", "1e3", "007", "0x10", "on", "true", "null", "nan", "-5", "1_0", "ü", "a=b", "a#b;c", "a'b",
    'say "x"', "(a)", "[a]", "a,b", "a b", "{x", "back\\", "~x", "$HOME", "%Y", "a:b",
)  # fmt: skip


@pytest.mark.parametrize("text", TYPED)
def test_text_stays_as_it_is_typed(text: str) -> None:
    found = configuration_of(
        [f"name={text}", f"data.cache={text}x", f"logging.entity={text}x", f"model.name={text}", f"run_root={text}"]
    )
    assert found.name == found.model.name == found.run_root == text
    assert found.data.cache == found.logging.entity == f"{text}x"


def test_quotes_nulls_and_interpolations_of_hydra_keep_their_meaning() -> None:
    words = ["name='a b'", 'model.name="3.10"', "data.cache=null", "logging.group=${model.name}_x", "run_root=\\${x}"]
    found = configuration_of(words)
    assert (found.name, found.model.name, found.data.cache) == ("a b", "3.10", None)
    assert (found.logging.group, found.run_root) == ("3.10_x", "${x}")


def test_entries_of_lists_of_text_stay_as_they_are_typed() -> None:
    words = ["logging.tags=[1e3, 2024_01, a=b, 'x, y', on, ü]", "data=prefixes"]
    found = configuration_of([*words, "data.prefixes=[{path: 3.10, weight: 2}, {path: my/b, weight: 1e0}]"])
    assert found.logging.tags == ["1e3", "2024_01", "a=b", "x, y", "on", "ü"]
    assert found.data.prefixes == [{"path": "3.10", "weight": 2}, {"path": "my/b", "weight": 1.0}]
    assert configuration_of(["data=prefixes", "data.prefixes=[007,null]"]).data.prefixes == ["007", "null"]
    assert configuration_of(["logging.tags=[]"]).logging.tags == []
    suite = settled(
        ["suite.overrides=[+training.stepz=3]", "~suite.variants.sep", "+suite.rows.a=[b=c]"], SuiteSettings
    )
    assert suite == ["suite.overrides=['+training.stepz=3']", "~suite.variants.sep", "+suite.rows.a=['b=c']"]


@pytest.mark.parametrize(
    ("words", "advice"),
    [
        (["data.prefixes=[a,", "b]"], "put quotes around the whole of it, 'data.prefixes=[a, b]'."),
        (
            ["training.curriculum=[{length:", "0.5,", "steps:", "0.5}]"],
            "'training.curriculum=[{length: 0.5, steps: 0.5}]'",
        ),
        (["attention.separators=[a,b"], "'attention.separators=[a,b]'"),
        (["attention.separators=[classes:[comma]]"], "'attention.separators=[{KEY: VALUE, KEY: VALUE}]'"),
        (["name=a", "b"], "put quotes around both, 'name=a b'."),
        (["experiment=demo_sep"], "write +experiment=demo_sep."),
        (["demo_sep"], "write +experiment=demo_sep."),
        (["+experiment", "demo_sep"], "write +experiment=demo_sep."),
        (["model", "=", "pythia14m"], "write model=pythia14m."),
        (["training.steps=", "5"], "write training.steps=5."),
        (["training.steps==5"], "write training.steps=5."),
        (["training.steps:5"], "write training.steps=5."),
        (["training.steps"], "write training.steps=VALUE."),
        (["training.steps=ü"], "the value of training.steps=ü is not a whole number."),
        (["training.steps=1,000"], "a run takes one"),
        (["training.steps=choice(1,2)"], "a run takes one"),
        (["+training.steps=5"], "write it without the plus, training.steps=VALUE."),
        (["'name=x'"], "write name=x."),
        (["training.steps=" + "[" * 1000], "no key takes that"),
        (["name=" + "x" * 100_000], "at most 65,536"),
    ],
)  # fmt: skip
def test_a_word_that_cannot_be_read_is_answered_with_one_that_can(words: list[str], advice: str) -> None:
    with pytest.raises(UserError) as refused:
        configuration_of(words)
    told = str(refused.value)
    assert advice in told and "\n" not in told and len(told) < 600
    assert not any(word in told for word in ("Lexer", "viable", "mismatched", "<EOF>"))


@pytest.mark.parametrize(
    ("words", "advice"),
    [
        (["pretrain", "--experiment", "demo_sep"], "write +experiment=demo_sep;"),
        (["pretrain", "--experiment=demo_sep"], "write +experiment=demo_sep;"),
        (["pretrain", "--lr", "1e-3"], "write optim.lr=1e-3;"),
        (["pretrain", "--model", "pythia14m"], "write model=pythia14m;"),
        (["pretrain", "-m"], "keys are written KEY=VALUE"),
        (["suite", "--suite", "paper"], "write +suite=paper;"),
        (["suite", "-m", "+suite=paper"], "keys are written KEY=VALUE"),
    ],
)
def test_options_that_are_keys(words: list[str], advice: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 2
    assert advice in capsys.readouterr().err


@pytest.mark.parametrize(
    "override",
    [
        "name=${oc.env:HIDDEN}",
        "name=x${oc.env:HIDDEN,default}",
        "logging.entity=${oc.decode:${oc.env:HIDDEN}}",
        "logging.tags=[${oc.env:HIDDEN}]",
        "training.steps=${oc.env:HIDDEN}",
        "+experiment=${oc.env:HIDDEN}",
        "attention.separators=[{classes: ['${oc.env:HIDDEN}'], horizon: 3}]",
    ],
)
def test_the_environment_is_not_read_into_a_configuration(
    override: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What it stands for would be in config.yaml, the tracker and every export of the run."""
    monkeypatch.setenv("HIDDEN", "hunter2")
    monkeypatch.chdir(tmp_path)
    assert main(["pretrain", override]) == 2
    output, errors = capsys.readouterr()
    assert "hunter2" not in output + errors and not list(tmp_path.iterdir())
    assert errors.startswith("error: configuration: ") and "${oc.env:HIDDEN}" in errors


@pytest.mark.parametrize("text", ["a", "it's", "back\\", "\\'", "${oc.env:HOME}", "\\${x}", "a\\\\", "ü [1], {b: c}"])
def test_a_literal_is_taken_as_it_is(text: str) -> None:
    assert configuration_of([f"run_root={literal(text)}"]).run_root == text


@pytest.mark.parametrize(
    "override",
    [
        "model.layers=100000000",
        "model.hidden=1000000000",
        "parallel.pipeline=100000000",
        "data.workers=1000000",
        "data.sequence_length=99999999999",
        "training.steps=100000000000000000",
        "training.global_batch=99999999999",
        "training.hang_seconds=1e300",
        "parallel.timeout_seconds=1e300",
        "attention.window=1000000000000000000000",
        "attention.window=[1000000000000000000000]",
        pytest.param(f"logging.profile_ranks=[{','.join('1' * 10_001)}]", marks=pytest.mark.slow),
    ],
)
def test_giant_values_are_refused_before_anything_is_made_of_them(override: str) -> None:
    with pytest.raises(UserError, match=f"{override.partition('=')[0].rpartition('.')[2]}.* must (be|have) at most"):
        configuration_of([override])


@pytest.mark.parametrize(
    "override", ["attention.full_layers=[${model}]", "attention.window=${model}", "logging.tags=${name}"]
)
def test_an_interpolation_of_another_type_is_refused(override: str) -> None:
    with pytest.raises(UserError, match=override.partition("=")[0]):
        configuration_of([override])


def test_the_schema_is_taken_as_it_is() -> None:
    assert configuration_of(["+experiment=demo_sep"]) == configuration_of(["+experiment=demo_sep", "++seed=1234"])
    assert isinstance(configuration_of([]), Config)


def test_the_batch_scripts_read_overrides_as_a_run_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Slurm's question whether a run is requeued: python -m sepllm_train.training.requeue JOB OVERRIDES."""
    words = ["requeue", "7", "+experiment=demo_sep", f"run_root={tmp_path}", "name=3.10"]
    for more, code, words_told in (([], 1, f"making {tmp_path / '3.10'}."), (["+foo=1"], 2, "no key foo")):
        monkeypatch.setattr("sys.argv", [*words, *more])
        with pytest.raises(SystemExit) as ended:
            requeue.main()
        output, errors = capsys.readouterr()
        assert ended.value.code == code and words_told in output + errors
