#!/usr/bin/env bash
# pybind11 3: a second build of a module, loaded from another file, is the first one again.
#
# Expected: two files that hold a module of the same name, loaded by ExtensionFileLoader and kept out of sys.modules, are
#   two modules, as two .py files are: so one process can time a kernel before and after a change, in turns.
# Versions: pybind11 3.0.4 (torch 2.13 ships it), Python 3.11, g++ 12.
# Behaviour: PYBIND11_MODULE keeps each module by its name, for the whole interpreter. The second file is mapped into the
#   process and never run; its loader returns the first module, whose __file__ and functions are the first file's. Nothing
#   is said. A comparison of the two builds then compares the first with itself, and finds a ratio of 1.00. Where the names
#   differ in a package, which need not exist, there are two modules.
# Seen (2026-12-01): "of one name: 1 1; of two packages: 1 2"
# For our users: CONTRIBUTING.md says how to compare two builds.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
cat > "$folder/kernel.cpp" <<'CPP'
#include <pybind11/pybind11.h>
PYBIND11_MODULE(kernel, m) {
  m.def("build", [] { return BUILD; });
}
CPP
cat > "$folder/load.py" <<'PY'
import importlib.util
import sys
from importlib.machinery import ExtensionFileLoader


def load(name, path):
    loader = ExtensionFileLoader(name, path)
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader(name, loader))
    loader.exec_module(module)
    return module


paths = sys.argv[1:]
alike = [load("kernel", path).build() for path in paths]
packages = [load(f"package{i}.kernel", path).build() for i, path in enumerate(paths)]
print("of one name:", *alike, end="; ")
print("of two packages:", *packages)
PY
python="$folder/venv/bin/python"
"$python" -m pip install --quiet "pybind11==3.0.4"
for build in 1 2; do
  # shellcheck disable=SC2046
  g++ -shared -fPIC -std=c++17 -fvisibility=hidden -DBUILD=$build $("$python" -m pybind11 --includes) \
    "$folder/kernel.cpp" -o "$folder/build$build.so"
done
said=$("$python" "$folder/load.py" "$folder/build1.so" "$folder/build2.so")
echo "$said"
[ "$said" = "of one name: 1 1; of two packages: 1 2" ]
