"""Check that no object compiled for one instruction set can lend its code to another machine.

Each ``csrc/isa/<isa>.cpp`` is compiled with flags of its own. A symbol it exports outside
``kt::<isa>::``, such as the weak copy of a ``std::`` template, may be the one the linker keeps for
everybody: then a machine without that instruction set dies of SIGILL, far from the cause.

``python tools/check_symbols.py BUILD_DIR`` asks ``nm`` (or ``$NM``) about the objects of a build.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

# csrc/CMakeLists.txt makes one object library of this name for each instruction set.
_OBJECT_FOLDER = re.compile(r"kt_isa_(\w+)\.dir")


def isa_objects(build_dir: Path) -> dict[str, list[Path]]:
    """Return the object files below ``build_dir`` by the instruction set they are for."""
    objects: dict[str, list[Path]] = {}
    for path in sorted(build_dir.rglob("*.o")):
        for part in path.parts:
            if match := _OBJECT_FOLDER.fullmatch(part):
                objects.setdefault(match[1], []).append(path)
    return objects


def foreign_symbols(nm_output: str, isa: str) -> list[str]:
    """Return the symbols that are not in ``kt::<isa>::``, of ``nm --format=posix``'s output.

    Mangled names are compared (Itanium C++ ABI, 5.1): ``N``, then each scope with its length. A
    demangled name would not do, since ``std::vector<kt::avx2::X>`` holds the namespace too.
    """
    table = "(?:T[VTIS]|GV|GR)?"  # virtual table, type information, guard variable ...
    sanitizer = r"(?:__odr_asan\.)?"  # AddressSanitizer's mark beside each variable
    own = re.compile(rf"{sanitizer}_Z{table}Z?NV?K?2kt{len(isa)}{isa}")
    names = [line.split()[0] for line in nm_output.splitlines() if line.strip()]
    return [name for name in names if not own.match(name)]


def exported_symbols(path: Path) -> str:
    """Return what ``nm`` says of the symbols that the linker sees."""
    command = [os.environ.get("NM", "nm"), "--defined-only", "--extern-only", "--format=posix"]
    done = subprocess.run([*command, str(path)], check=True, capture_output=True, text=True)
    return done.stdout


def main(arguments: Sequence[str] | None = None) -> int:
    """Check every object and return 1 if one exports what it must not, or none was found."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("build_dir", type=Path, help="folder below which the objects are")
    build_dir = parser.parse_args(arguments).build_dir
    objects = isa_objects(build_dir)
    if not objects:
        sys.stderr.write(f"no objects of csrc/isa below {build_dir}: build the extension first\n")
        return 1
    problems = 0
    for isa, paths in objects.items():
        for path in paths:
            for name in foreign_symbols(exported_symbols(path), isa):
                problems += 1
                sys.stderr.write(f"{path} exports {name}, which is outside kt::{isa}::\n")
    sys.stdout.write(f"{', '.join(objects)}: {problems} symbols outside their namespace\n")
    return int(problems > 0)


if __name__ == "__main__":
    sys.exit(main())
