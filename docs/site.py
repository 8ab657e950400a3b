"""What the documentation site is made of beyond docs/: the README, the changelog, and the files that pages point at.

Invariant: a link that works in the repository works on the site, with nothing written twice: a page that lies elsewhere
becomes a page of the site, a file becomes one that is shown, and a folder a page that lists it. mkdocs calls these
functions (`hooks` in mkdocs.yml); `mkdocs build --strict` fails where a link leads nowhere.
"""

import os
import re
from pathlib import Path, PurePosixPath

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
# Pages of the site that lie beside docs/.
ELSEWHERE = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
_LINK = re.compile(r"(\]\()([^)\s#]+)((?:#[^)\s]*)?\))")
_CODE = re.compile(r"(?ms)^```.*?^```|^(?: {4}|\t).*?$|`[^`\n]*`")
_LANGUAGES = {".proto": "protobuf", ".py": "python", ".yml": "yaml", ".yaml": "yaml", ".conf": "nginx", ".toml": "toml"}
_PICTURES = {".png", ".svg"}


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Puts every runbook into the menu, where `RUNBOOKS` stands: there is one for each alert."""
    pages = [path.relative_to(ROOT / "docs").as_posix() for path in sorted((ROOT / "docs" / "runbooks").glob("*.md"))]
    for section in config.nav or ():
        for items in section.values() if isinstance(section, dict) else ():
            if "RUNBOOKS" in items:
                items[items.index("RUNBOOKS")] = {"Runbooks": ["runbooks/index.md", *pages]}
    return config


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """Adds the pages that lie elsewhere, and all that any page points at."""
    for source, name in ELSEWHERE.items():
        files.append(File.generated(config, name, content=_localised((ROOT / source).read_text(), PurePosixPath())))
    runbooks = sorted(file.name for file in files.documentation_pages() if file.src_uri.startswith("runbooks/"))
    listed = "\n".join(f"- [{name}]({name}.md)" for name in runbooks)
    text = f"# Runbooks\n\nOne for each alert of Prometheus.\n\n{listed}\n"
    files.append(File.generated(config, "runbooks/index.md", content=text))
    texts = [((ROOT / source).read_text(), PurePosixPath()) for source in ELSEWHERE]
    texts += [
        (file.content_string, PurePosixPath("docs") / PurePosixPath(file.src_uri).parent)
        for file in files.documentation_pages()
        if not file.generated_by
    ]
    for path in sorted({path for text, folder in texts for path in _pointed_at(text, folder)}):
        _add(files, config, path)
    return files


def on_page_markdown(markdown: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turns links that leave docs/ into links of the site."""
    del config, files
    if page.file.generated_by:
        return markdown
    return _localised(markdown, PurePosixPath("docs") / PurePosixPath(page.file.src_uri).parent)


def _pointed_at(text: str, folder: PurePosixPath) -> set[str]:
    """Paths in the repository, outside docs/, that a page links to."""
    found = set()
    for match in _LINK.finditer(_CODE.sub("", text)):
        path = _resolved(match[2], folder)
        if path is not None and not path.startswith("docs/") and path not in ELSEWHERE and (ROOT / path).exists():
            found.add(path)
    return found


def _add(files: Files, config: MkDocsConfig, path: str) -> None:
    """A file that is pointed at: a picture as it is, any other on a page; of a folder, its files too."""
    found = ROOT / path
    if found.is_dir():
        inside = sorted(each for each in found.rglob("*") if each.is_file() and "__pycache__" not in each.parts)
        names = [each.relative_to(found).as_posix() for each in inside]
        listed = "\n".join(f"- [{name}]({found.name}/{_page_of(name)})" for name in names)
        _append(files, File.generated(config, f"source/{path}.md", content=f"# {path}\n\n{listed}\n"))
        for name in names:
            _add(files, config, f"{path}/{name}")
    elif found.suffix in _PICTURES:
        _append(files, File.generated(config, f"source/{path}", abs_src_path=str(found)))
    elif found.suffix == ".md":
        text = _localised(found.read_text(), PurePosixPath(path).parent, PurePosixPath(f"source/{path}").parent)
        _append(files, File.generated(config, f"source/{path}", content=text))
    else:
        fence = f"# {path}\n\n~~~~{_LANGUAGES.get(found.suffix, 'text')}\n{found.read_text()}\n~~~~\n"
        _append(files, File.generated(config, f"source/{_page_of(path)}", content=fence))


def _append(files: Files, file: File) -> None:
    if files.get_file_from_path(file.src_uri) is None:
        files.append(file)


def _page_of(path: str) -> str:
    """The name of the page that shows a file; a picture is shown as it is."""
    return path if PurePosixPath(path).suffix in {*_PICTURES, ".md"} else f"{path}.md"


def _localised(text: str, folder: PurePosixPath, at: PurePosixPath | None = None) -> str:
    """A page's text with links as the site has them.

    Args:
        text: of the page.
        folder: that it lies in, in the repository.
        at: folder of its page on the site; None: where docs/ has it.
    """
    place = at if at is not None else PurePosixPath(os.path.relpath(folder, "docs") if folder.parts else ".")
    code = [match.span() for match in _CODE.finditer(text)]

    def link(match: re.Match[str]) -> str:
        if any(begin <= match.start() < end for begin, end in code):
            return match[0]
        path = _resolved(match[2], folder)
        if path is None:
            return match[0]
        return match[1] + os.path.relpath(_on_site(path), place) + match[3]

    return _LINK.sub(link, text)


def _resolved(target: str, folder: PurePosixPath) -> str | None:
    """The path in the repository that a link leads to; None: it leads into the world, or within its page."""
    if "://" in target or target.startswith(("mailto:", "#")):
        return None
    return os.path.normpath(folder / target)


def _on_site(path: str) -> str:
    if path.startswith("docs/"):
        return path.removeprefix("docs/") + ("/index.md" if (ROOT / path).is_dir() else "")
    if path in ELSEWHERE:
        return ELSEWHERE[path]
    return f"source/{path}.md" if (ROOT / path).is_dir() else f"source/{_page_of(path)}"
