"""docs/structure.md is made of the first sentences of the modules themselves. `make format` writes it, a test compares it."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
SRC = ROOT / "src"
PAGE = ROOT / "docs" / "structure.md"

# From the top down: what of the package each row of the layers holds, and what it is.
LAYERS = (
    ("The package and its facades", ("", "__main__", "ps", "api")),
    ("Commands", ("cli",)),
    ("REST", ("http",)),
    ("The parameter server", ("server",)),
    ("The worker, inside the engine", ("worker",)),
    ("Engines", ("engines",)),
    ("Transport", ("transport",)),
    ("Recorded loads", ("loads",)),
    ("Devices", ("devices",)),
    ("Host memory", ("memory",)),
    ("Planning", ("planning",)),
    ("Manifest, timelines, errors, settings, what is kept", ("manifest", "timeline", "errors", "recent", "settings")),
)

HEAD = """\
# Structure

One sentence for each module, from the top layer to the bottom one; each module's own first sentence is the source, and
`make format` writes this page. Imports point down only, and `make check` keeps it so (import-linter, in `pyproject.toml`):

```
__main__
cli                         commands
http                        REST, dashboard, metrics
api, ps                     import paths of the contract
server | worker             beside the accelerator | inside the engine: neither imports the other
engines                     how an engine is asked to update; a small engine of our own
transport                   sessions, links, collectives
loads                       what a loader copies where: recorded, proved, replayed
devices                     streams, events, memory shared across processes
memory                      host memory, the safetensors reader
planning                    pure: buckets, order, sizes, cost
manifest, timeline          pure data: who holds what; when which stage was at work
errors, settings
```

What runs inside an engine's worker imports torch, zmq and msgspec only, besides the standard library.
"""


def modules() -> list[Path]:
    return sorted(SRC.rglob("*.py"))


def module_name(path: Path) -> str:
    parts = path.relative_to(SRC).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def first_sentence(path: Path) -> str:
    paragraph = " ".join((ast.get_docstring(ast.parse(path.read_text())) or "").split("\n\n")[0].split())
    found = re.match(r".*?\.(?=\s|$)", paragraph)
    return found[0] if found else paragraph


def render() -> str:
    """The page as it ought to be. Every module is in exactly one layer, or a ValueError names it."""
    left = {module_name(path): path for path in modules()}
    page = HEAD
    for title, tops in LAYERS:
        names = [name for name in left if [*name.split("."), ""][1] in tops]
        if names:
            page += f"\n## {title}\n\n| module | what it is |\n|---|---|\n"
        for name in names:
            page += f"| `{name}` | {first_sentence(left.pop(name)).replace('|', chr(92) + '|')} |\n"
    if left:
        raise ValueError(f"in no layer: {', '.join(left)}")
    return page


if __name__ == "__main__":
    PAGE.write_text(render())
