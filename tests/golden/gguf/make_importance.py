"""An importance file as the `gguf` package writes one: `importance.gguf`.

pip install gguf==0.19.0; PYTHONPATH=. python tests/golden/gguf/make_importance.py
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from gguf import GGUFWriter

writer = GGUFWriter(Path(__file__).parent / "importance.gguf", "none")
writer.add_type("imatrix")
writer.add_array("imatrix.datasets", ["calibration.txt"])
writer.add_uint32("imatrix.chunk_count", 3)
writer.add_uint32("imatrix.chunk_size", 512)
dense = np.arange(64, dtype=np.float32) * 0.75
experts = np.arange(3 * 32, dtype=np.float32).reshape(3, 32)
writer.add_tensor("blk.0.attn_q.weight.in_sum2", dense)
writer.add_tensor("blk.0.attn_q.weight.counts", np.array([1536], dtype=np.float32))
writer.add_tensor("blk.0.attn_q.weight.in_sum", dense)
writer.add_tensor("blk.0.ffn_up_exps.weight.in_sum2", experts)
writer.add_tensor("blk.0.ffn_up_exps.weight.counts", np.array([[100], [0], [1436]], dtype=np.float32))
writer.write_header_to_file()
writer.write_kv_data_to_file()
writer.write_tensors_to_file()
writer.close()
