"""What mkdocs.yml cannot say: the README as the first page, the notebook as a page, links to files beside docs/."""

import json
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PICTURES = "benchmarks/results/bench_lora_h200.png", "LICENSE"


def on_files(files: Any, config: Any) -> Any:
    from mkdocs.structure.files import File

    def add(uri: str, **content: Any) -> None:
        files.append(File.generated(config, uri, **content))

    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    add("index.md", content=re.sub(r"\]\(docs/", "](", readme.replace("](CONTRIBUTING.md)", "](../CONTRIBUTING.md)")))
    notebook = files.get_file_from_path("quickstart.ipynb")
    files.remove(notebook)
    add("quickstart.md", content=page_of((ROOT / "docs" / "quickstart.ipynb").read_text(encoding="utf-8")))
    for picture in PICTURES:
        add(picture, content=(ROOT / picture).read_bytes())
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Links out of docs/ lead into the repository, once it has a public place (``repo_url``); until then they are
    names of files."""
    where = (config["repo_url"] or "").rstrip("/")
    target = rf"[\1]({where}/blob/main/\2)" if where else r"\1 (`\2`)"
    markdown = re.sub(r"\[([^\]]+)\]\((?:\.\./)((?!docs/)[^)\s]+)\)", target, markdown)
    if page.file.src_uri == "index.md":
        names = r"\[([^\]!]+)\]\((CHANGELOG\.md)\)"
        markdown = re.sub(names, target, markdown)
    return markdown


def page_of(notebook: str) -> str:
    """A notebook as Markdown: its text, its code, and what the code printed when it was last run."""
    parts = []
    for cell in json.loads(notebook)["cells"]:
        text = "".join(cell["source"])
        parts.append(f"```python\n{text}\n```" if cell["cell_type"] == "code" else text)
        said = "".join("".join(output.get("text", "")) for output in cell.get("outputs", ()))
        if said:
            parts.append(f"```text\n{said.rstrip()}\n```")
    return "\n\n".join(parts) + "\n"
