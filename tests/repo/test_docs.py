"""The documentation site: built in strict mode, without network, from the pages, the schema and the docstrings."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from mslora_cr.config.methods import load_method, method_names
from mslora_cr.config.schema import StreamConfig

ROOT = Path(__file__).parents[2]


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="not a git checkout")
def test_no_page_that_is_made_stands_in_the_repository() -> None:
    tracked = subprocess.run(["git", "ls-files", "docs"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    pages = ("index", "changelog", "contributing", "security", "reference/configuration", "reference/python")
    assert not set(tracked.split()) & {f"docs/{page}.md" for page in pages}


@pytest.mark.long  # `make docs` builds it too
def test_the_site_is_built_and_its_reference_is_whole(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "reference" / "configuration.html").read_text(encoding="utf-8")
    documented = set(re.findall(r"<td><code>(\w+)</code></td>", page))
    sections = [load_method(name).section for name in method_names()]
    wanted = {field for model in (StreamConfig, *filter(None, sections)) for field in model.model_fields}
    assert wanted - documented <= {"method_section"}, "every key stands in the reference"
    loaded = [
        url
        for file in tmp_path.rglob("*.html")
        for url in re.findall(r'<(?:script|img|link)[^>]* src="(https?:[^"]+)', file.read_text(encoding="utf-8"))
    ]
    assert not loaded, "no page asks another host for anything"
