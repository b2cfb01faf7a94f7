"""The published members of the U-Net family: how many parameters they have here and in the literature.

    python scripts/bench_members.py --out COUNTS.json --table COUNTS.md

Everything is built on the meta device: it takes seconds and no memory.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from autoseg import __version__
from autoseg.network.members import load_member, member_names, num_parameters

HEAD = """\
# Parameter counts of the published members

Each is one file in [configs/members](../../configs/members). Its U-Net is built from that file alone, and its learned
parameters are counted; a test holds every count within 1 % of the figure (`tests/golden/test_members.py`).

```sh
python scripts/bench_members.py --out docs/benchmarks/parameter-counts.json --table docs/benchmarks/parameter-counts.md
```

"""

FOOT = """
- *Without norms*: the scales and shifts of norms are left out, as the paper's figure does; with them there are
  {unet_3d_with_norms:,}.
- Two figures are not from a paper, because it states none: those of the U-Net of 2015 and of V-Net. V-Net is here as it
  is commonly built; the implementations have a 5×5×5 convolution in front of the paper's 1×1×1 head, 8,000 parameters.
- nnU-Net's figures are counts of its own library for one channel and two classes, with all heads of deep supervision. L
  and XL have the plan that nnU-Net's planner makes for images of 200 × 300 × 300 voxels of 1 mm; M and L then differ in
  the patch alone.
- With the same weights, mapped by name, outputs equal those of nnU-Net's PlainConvUNet and ResidualEncoderUNet and of
  MONAI's DynUNet and DiffusionModelUNet within 1e-5 (`tests/golden/test_family_equals_oracles.py`).
"""


def measure() -> dict[str, Any]:
    rows = []
    for name in member_names():
        member = load_member(name)
        published = member.published
        rows.append(
            {
                "member": name,
                "title": member.title,
                "parameters": num_parameters(member.network, published.without_norms),
                "parameters_with_norms": num_parameters(member.network),
                "published": published.parameters,
                "without_norms": published.without_norms,
                "source": published.source,
            }
        )
    return {"autoseg": __version__, "torch": torch.__version__, "members": rows}


def table(result: dict[str, Any]) -> str:
    lines = ["| member | ours | published | difference | the figure is from |", "|---|---|---|---|---|"]
    for row in sorted(result["members"], key=lambda row: row["parameters"]):
        ours, published = row["parameters"], row["published"]
        norms = " (without norms)" if row["without_norms"] else ""
        difference = f"{100 * (ours / published - 1):+.2f} %" if ours != published else "0"
        link = f"[{row['title']}](../../configs/members/{row['member']}.yaml)"
        lines.append(f"| {link} | {ours:,}{norms} | {published:,} | {difference} | {row['source']} |")
    counts = {row["member"]: row["parameters_with_norms"] for row in result["members"]}
    return HEAD + "\n".join(lines) + "\n" + FOOT.format(unet_3d_with_norms=counts["unet-3d-2016"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="the JSON file")
    parser.add_argument("--table", type=Path, required=True, help="the page made from it")
    args = parser.parse_args()
    result = measure()
    args.out.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    args.table.write_text(table(result), encoding="utf-8")


if __name__ == "__main__":
    main()
