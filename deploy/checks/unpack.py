"""What other tools do not look into: pods of a RayService, and rules in a ConfigMap.

python deploy/checks/unpack.py RENDERED.yaml DIRECTORY
"""

import sys
from pathlib import Path

import yaml


def main(rendered: Path, directory: Path) -> None:
    (directory / "rules").mkdir(parents=True)
    pods = []
    for each in yaml.safe_load_all(rendered.read_text()):
        if each["kind"] == "RayService":
            cluster = each["spec"]["rayClusterConfig"]
            groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
            for index, group in enumerate(groups):
                metadata = {"name": f"ray-{index}", "namespace": each["metadata"]["namespace"]}
                metadata |= group["template"]["metadata"]
                spec = group["template"]["spec"]
                pods.append({"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": spec})
        elif each["kind"] == "ConfigMap" and each["metadata"]["name"] == "headroom-rules":
            for name, text in each["data"].items():
                (directory / "rules" / name).write_text(text)
    (directory / "pods.yaml").write_text(yaml.safe_dump_all(pods))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
