"""Run in a process without our package: load each saved model with its own code, keep its outputs, save it again."""

from __future__ import annotations

import sys
import traceback
from pathlib import Path

sys.modules["moh"] = None  # type: ignore[assignment]

import torch  # noqa: E402
import transformers  # noqa: E402


@torch.no_grad()
def run(folder: Path) -> None:
    case = torch.load(folder / "case.pt")
    kind = getattr(transformers, case["auto"])
    model = kind.from_pretrained(folder / "model", trust_remote_code=True).eval()
    assert type(model).__module__.endswith("modeling_moh")
    got = {"output": model(**case["inputs"])[0]}
    if case["generate"]:
        got["generated"] = model.generate(**case["inputs"], max_new_tokens=6, do_sample=False)
    model.save_pretrained(folder / "again")
    again = kind.from_pretrained(folder / "again", trust_remote_code=True).eval()
    got["again"] = again(**case["inputs"])[0]
    if case["train"]:
        with torch.enable_grad():
            again.train()(**case["inputs"])[0].square().mean().backward()
        got["gradients"] = {name: p.grad for name, p in again.named_parameters() if p.grad is not None}
    torch.save(got, folder / "got.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    for folder in sorted(path for path in Path(sys.argv[1]).iterdir() if (path / "case.pt").is_file()):
        try:
            run(folder)
        except Exception:
            (folder / "error.txt").write_text(traceback.format_exc())  # the other cases still run
