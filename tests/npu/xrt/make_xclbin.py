"""An xclbin for the fake driver, with XRT's own xclbinutil.

The container is a real one; its PDI is the tag and the path that `fake_amdxdna.cpp` looks for.
"""

import json
import subprocess
import uuid
from pathlib import Path

KERNEL = "0x901"


def make(folder: Path, library: Path) -> None:
    """Write folder/kernel.xclbin; `library` is the path that its PDI names."""
    (folder / "kernel.pdi").write_bytes((b"UNICORN\0" + str(library).encode()).ljust(256, b"\0"))
    arguments = [
        {"name": "opcode", "address-qualifier": "SCALAR", "type": "uint64_t", "offset": "0x00"},
        {
            "name": "instr",
            "memory-connection": "SRAM",
            "address-qualifier": "GLOBAL",
            "type": "char *",
            "offset": "0x08",
        },
        {"name": "ninstr", "address-qualifier": "SCALAR", "type": "uint32_t", "offset": "0x10"},
    ]
    arguments += [
        {
            "name": f"bo{i}",
            "memory-connection": "HOST",
            "address-qualifier": "GLOBAL",
            "type": "void*",
            "offset": hex(0x14 + 8 * i),
        }
        for i in range(3)
    ]
    extended = {"subtype": "DPU", "functional": "0", "dpu_kernel_id": KERNEL}
    kernel = {"name": "MLIR_AIE", "type": "dpu", "extended-data": extended, "arguments": arguments}
    memories = [("HOST", "0x10000"), ("SRAM", "0xc000")]
    pdi = {
        "uuid": str(uuid.uuid4()),
        "file_name": str(folder / "kernel.pdi"),
        "cdo_groups": [
            {"name": "DPU", "type": "PRIMARY", "pdi_id": "0x01", "dpu_kernel_ids": [KERNEL], "pre_cdo_groups": ["0xC1"]}
        ],
    }
    sections = {
        "kernels": {"ps-kernels": {"kernels": [{**kernel, "instances": [{"name": "MLIRAIE"}]}]}},
        "memory": {
            "mem_topology": {
                "m_count": "2",
                "m_mem_data": [
                    {
                        "m_type": "MEM_DRAM",
                        "m_used": "1",
                        "m_sizeKB": size,
                        "m_tag": tag,
                        "m_base_address": "0x4000000",
                    }
                    for tag, size in memories
                ],
            }
        },
        "partition": {
            "aie_partition": {
                "name": "QoS",
                "operations_per_cycle": "2048",
                "inference_fingerprint": "1",
                "pre_post_fingerprint": "1",
                "partition": {"column_width": 4, "start_columns": [0]},
                "PDIs": [pdi],
            }
        },
    }
    for name, content in sections.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    command = ["xclbinutil", "--force", "--quiet", "--output", str(folder / "kernel.xclbin")]
    command += ["--add-replace-section", f"MEM_TOPOLOGY:JSON:{folder / 'memory.json'}"]
    command += ["--add-kernel", str(folder / "kernels.json")]
    command += ["--add-replace-section", f"AIE_PARTITION:JSON:{folder / 'partition.json'}"]
    subprocess.run(command, check=True)

    for name in (*(f"{section}.json" for section in sections), "kernel.pdi"):
        (folder / name).unlink()
