#!/bin/sh
# Installs the package beside its locked dependencies in /opt/headroom, writes down what the image
# holds, and removes what only developers need.
set -eu
cd /build
site=/opt/headroom/lib/python3.11/site-packages

# The image runs on other processors than the one that builds it.
HEADROOM_PROCESSORS=all PIP_REQUIRE_HASHES=0 pip install --no-deps --no-build-isolation .
# A compiler that fails leaves a package that works, slowly; in an image it has to be an error.
test "$(find "$site/models/cpu" -name '_operations*.so' | wc -l)" -eq 3
pip uninstall --quiet --yes pip

mkdir -p /opt/headroom/share/headroom
/opt/tools/bin/cyclonedx-py environment --output-reproducible --output-format JSON \
    --output-file /opt/headroom/share/headroom/sbom.cdx.json /opt/headroom/bin/python
/opt/tools/bin/pip-licenses --python /opt/headroom/bin/python --format=markdown --with-urls \
    --output-file /opt/headroom/share/headroom/licences.md

# Headers, C++ tests and Java of libraries: a fifth of their size, and never loaded.
rm -rf "$site/torch/include" "$site/torch/test" "$site/ray/jars" "$site/ray/include" "$site/ray/cpp"
find "$site/torch/bin" -type f ! -name torch_shm_manager -delete
find "$site" -name '*.a' -delete
strip "$site"/models/cpu/*.so
