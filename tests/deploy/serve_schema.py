"""What Ray Serve reads of configurations: JSON lines in, JSON lines out.

A program of its own: importing Ray Serve warns, and reads variables that a runtime sets before.
"""

import json
import sys

from ray.serve.schema import ServeDeploySchema

for line in sys.stdin:
    schema = ServeDeploySchema.model_validate_json(line)
    print(json.dumps(schema.model_dump(exclude_unset=True), default=str))
