"""What `scripts/demo` prints of what was measured and said."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_a_line_for_each_file_and_what_those_say_that_said_something(tmp_path: Path) -> None:
    for name, size, bpw, perplexity in (("f16", 542_800_000, 16.0, 19.8), ("out", 225_700_000, 3.25, 22.5)):
        measured = {"bytes": size, "bpw": bpw + 0.5, "perplexity": perplexity}
        (tmp_path / f"{name}.eval.json").write_text(json.dumps(measured))
        (tmp_path / f"{name}.inspect.json").write_text(json.dumps({"block_bpw": bpw}))
    (tmp_path / "question.txt").write_text("Tell me a story.\n")
    (tmp_path / "out.txt").write_text("There lived\n\na " + "very " * 40 + "old man")
    command = [sys.executable, str(ROOT / "scripts/demo_report.py"), str(tmp_path), "f16=16-bit", "out=TSQ3, learned"]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    head, first, second, empty, *story = said.splitlines()
    assert head.split("  ")[-1].strip() == "perplexity"
    assert first.split() == ["16-bit", "542.8", "MB", "16.50", "16.00", "19.80"]
    assert second.split() == ["TSQ3,", "learned", "225.7", "MB", "3.75", "3.25", "22.50"]
    assert len(head) == len(first) == len(second)
    assert not empty
    assert story[:3] == ["Tell me a story.", "", "TSQ3, learned:"]
    assert story[3].startswith("    There lived a very very")
    assert max(map(len, story)) <= 96
    assert " ".join(" ".join(story[3:]).split()) == "There lived a " + "very " * 40 + "old man"
