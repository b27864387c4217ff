"""Targets, presets, overrides and config files, and what bad ones are told."""

import os
import subprocess
import sys

import pytest

from effjax.study.resolve import configs_folder, resolve, resolve_saved


def test_default_preset_is_cpu():
    assert resolve("samuel").preset == "cpu"


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("samule", "Did you mean 'samuel'"),
        ("samuel:smok", "Did you mean 'smoke'"),
        ("nowhere.toml", "does not exist"),
    ],
)
def test_unknown_targets_suggest_near_names(target, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        resolve(target)


def test_overrides_are_typed_and_named_in_the_folder():
    study = resolve("samuel:smoke", ["--budget.amount", "77", "--seeds", "3", "4", "--train.accumulate", "2"])
    assert study.config.budget.amount == 77
    assert study.config.seeds == (3, 4)
    assert study.config.train.accumulate == 2
    assert study.overridden
    assert len(study.default_out.name.removeprefix("samuel-smoke-")) == 8
    assert str(resolve("samuel:smoke").default_out) == "runs/samuel-smoke"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--sedes", "1"], "Unrecognized options: --sedes.*Perhaps you meant: --seeds"),
        (["--seeds", "one"], r"--seeds.*\['one'\]"),
        (["--budget.unit", "hours"], "'hours'.*--budget.unit.*'device_seconds'"),
        (["--seeds", "1", "1"], "^seeds=.* different"),
        (["--budget.amount", "-3"], "^budget.amount=-3"),
        (["--arms", "adamm"], "Did you mean 'adam'"),
        (["--tasks", "digits"], "^tasks=.*DATA/MODEL"),
        (["--train.accumulate", "0"], "^train.accumulate=0"),
        (["--grid", "0.1", "0"], r"^grid\[1\]=0.0 must be a number in \(0"),
        (["--momentum", "1"], r"^momentum=1.0 must be a number in \[0, 1\)"),
    ],
)
def test_bad_overrides_name_the_field_in_one_line(words, message):
    with pytest.raises(ValueError, match=message) as caught:
        resolve("samuel:smoke", words)
    assert "\n" not in str(caught.value)


def test_a_config_file_is_a_preset_with_changes(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text('study = "samuel"\npreset = "smoke"\nseeds = [5]\n[budget]\namount = 10\n[train]\ndonate = false\n')
    study = resolve(str(path), ["--seeds", "6"])
    assert (study.config.seeds, study.config.budget.amount, study.config.train.donate) == ((6,), 10, False)


def test_a_config_file_as_editors_on_windows_write_it_names_its_preset_with_the_study(tmp_path):
    path = tmp_path / "MINE.TOML"
    path.write_bytes(b"\xef\xbb\xbf" + b'study = "samuel:smoke"\r\nseeds = [5]\r\n')
    study = resolve(str(path))
    assert (study.preset, study.config.seeds) == ("smoke", (5,))
    path.write_text('study = "samuel:smoke"\npreset = "cpu"\n')
    with pytest.raises(ValueError, match="names the presets 'smoke' and 'cpu'"):
        resolve(str(path))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('grid = ["--momentum", "0.1"]', r"grid\[0\]='--momentum' must be a number"),
        ("help = true", "'help' is no field.*The fields are budget, seeds"),
        ("sedes = [1]", "'sedes' is no field. Did you mean 'seeds'"),
        ('seeds = ["1"]', r"seeds\[0\]='1' must be an integer"),
        ("seeds = 3", "seeds=3 must be a list, each an integer"),
        ("seeds = [1, 1]", "seeds=.* different"),
        ("momentum = 2", r"momentum=2.0 must be a number in \[0, 1\)"),
        ('loop = "vmp"', "loop='vmp' must be one of 'vmap', 'map', 'unroll', 'auto'. Did you mean 'vmap'"),
        ('settings = ["shift", "ofline"]', r"settings\[1\]='ofline' must be one of.*'offline'"),
        ('train_rows = "all"', "train_rows='all' must be an integer"),
        ('[budget]\nunit = "hours"', "budget.unit='hours' must be one of 'steps', 'examples'"),
        ("[budget]\namuont = 10", "'budget.amuont' is no field. Did you mean 'amount'"),
        ("budget = 3", "budget=3 must be a table"),
        ('[train]\ndonate = "no"', "train.donate='no' must be true or false"),
        ("[train]\naccumulate = 0", "train.accumulate=0 must be an integer in"),
        ('[own]\npath = "x.csv"', "on the command line, by --data"),
        ("preset = 3", "preset=3 must be a text"),
    ],
)
def test_values_of_a_config_file_are_typed_and_never_words_of_the_command_line(tmp_path, text, message):
    path = tmp_path / "mine.toml"
    path.write_text(("" if "preset" in text else 'preset = "smoke"\n') + f'study = "samuel"\n{text}\n')
    with pytest.raises(ValueError, match=f"^config file '.*mine.toml'.*{message}"):
        resolve(str(path))


def test_a_folder_is_no_config_file(tmp_path):
    (tmp_path / "folder.toml").mkdir()
    with pytest.raises(ValueError, match="is a folder"):
        resolve(str(tmp_path / "folder.toml"))


@pytest.mark.parametrize(
    ("text", "message"), [("seeds = [1]\n", "names no study"), ("study = [\n", "is not TOML"), ("\xff", "is not TOML")]
)
def test_bad_config_files(tmp_path, text, message):
    path = tmp_path / "bad.toml"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=message):
        resolve(str(path))


def test_a_saved_config_comes_back():
    study = resolve("samuel:smoke", ["--budget.amount", "77"])
    assert resolve_saved("samuel", "smoke", study.config_dict) == study
    with pytest.raises(ValueError, match="'gone'"):
        resolve_saved("samuel", "smoke", study.config_dict | {"gone": 1})


def test_presets_are_found_from_another_directory(tmp_path):
    code = "from effjax.study.resolve import resolve; print(resolve('samuel:smoke').preset)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, env=os.environ, check=False
    )
    assert done.stdout.strip() == "smoke", done.stderr


def test_the_wheel_carries_configs_and_data(tmp_path):
    """Build the wheel, unpack it elsewhere, and resolve a preset from it alone."""
    hatchling = pytest.importorskip("hatchling.build", reason="the build backend is not installed here")
    root = configs_folder().parent
    if not (root / "pyproject.toml").exists():
        pytest.skip("not a checkout")
    import zipfile

    before = os.getcwd()
    os.chdir(root)
    try:
        name = hatchling.build_wheel(str(tmp_path))
    finally:
        os.chdir(before)
    assert (tmp_path / name).stat().st_size < 8e6
    zipfile.ZipFile(tmp_path / name).extractall(tmp_path / "site")
    code = (
        "import effjax; from effjax.study.resolve import configs_folder, resolve; resolve('samuel:smoke');"
        "print(effjax.__file__, configs_folder(), len(effjax.load_data('digits').splits))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(tmp_path / "site")},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(str(tmp_path / "site"))
    assert str(tmp_path / "site" / "effjax" / "configs") in done.stdout
