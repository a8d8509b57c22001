"""In the chroot: host-model artifacts of the contract's designs, with real xclbin containers: build_all.py FOLDER."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import contract
import make_xclbin

from unicorn_backend.runtime.npu import artifacts, host_model
from unicorn_backend.runtime.npu.designs import key

root = Path(sys.argv[1])
for design in contract.DESIGNS:
    library = root / key(design) / artifacts.LIBRARY
    host_model.build(design, root, lambda folder, library=library: make_xclbin.make(folder, library))
