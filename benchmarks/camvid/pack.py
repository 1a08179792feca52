"""Put a plan into one folder for a machine without a network: code, images as one archive, wheels of what is missing.

    python benchmarks/camvid/pack.py packed --data FOLDER --weights FOLDER --wheels

Copy the folder `packed` to the other machine, which needs Python, torch and torchvision, and start there one of

    sh packed/go.sh gpu --jobs 6     # the runs of a plan
    sh packed/go.sh check            # benchmarks/gpu_check.py: tests, step times, and runs, in eight minutes

What comes back is packed/results, and for `check` packed/code/results. On a GPU, sixteen runs at once need 74 to 105
seconds each if
CUDA's multi-process service is on (`nvidia-cuda-mps-control -d`).
"""
import argparse
import io
import re
import shutil
import subprocess
import sys
import tarfile
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
THERE = re.compile(r'torch|torchvision|triton|nvidia-.*|cuda-.*') # What the other machine brings
NEEDS = ('fastai','timm','safetensors','pandas','matplotlib','pillow','scipy','pytest','hypothesis','torchmetrics')
GO = """#!/bin/sh
# Unpack, install what is missing, and make the runs of a plan, or check the GPU:
#   sh go.sh PLAN [options of benchmarks/camvid/run.py]
#   sh go.sh check [options of benchmarks/gpu_check.py]
set -e
cd "$(dirname "$0")"
[ -f camvid/.whole ] || { tar xf camvid.tar && touch camvid/.whole; }
[ ! -d wheels ] || python3 -m pip install --quiet --no-index --no-deps wheels/*.whl
cd code
weights=; [ ! -d ../weights ] || weights="--weights ../weights"
if [ "$1" = check ]; then
  shift
  PYTHONPATH=. exec python3 benchmarks/gpu_check.py "$@" ${weights:+--data ../camvid} $weights
fi
exec python3 benchmarks/camvid/run.py "$@" --data ../camvid $weights --runs ../runs --results ../results
"""

def pack_images(data, archive, quality):
    "Write a SegNet copy of CamVid as one tar file; quality 0 keeps the images as they are."
    from PIL import Image
    from dropclass.data.camvid import segnet_pairs
    def add(name, content):
        info = tarfile.TarInfo(f'camvid/{name}')
        info.size = len(content)
        tar.addfile(info, io.BytesIO(content))
    with tarfile.open(archive, 'w') as tar:
        for split in ('train','val'):
            lines = []
            for image,mask in segnet_pairs(data, split):
                content,name = image.read_bytes(),f'{split}/{image.name}'
                if quality:
                    memory = io.BytesIO()
                    Image.open(image).convert('RGB').save(memory, 'JPEG', quality=quality, subsampling=0)
                    content,name = memory.getvalue(),f'{split}/{image.stem}.jpg'
                add(name, content)
                add(f'{split}annot/{mask.name}', mask.read_bytes())
                lines.append(f'{name} {split}annot/{mask.name}\n')
            add(f'{split}.txt', ''.join(lines).encode())

def needed(names):
    "Every installed distribution that these need, themselves included, without what the other machine has."
    from packaging.requirements import Requirement
    found,queue = {},list(names)
    while queue:
        name = re.sub(r'[-_.]+', '-', queue.pop()).lower()
        if name in found or THERE.fullmatch(name): continue
        try: dist = distribution(name)
        except PackageNotFoundError: continue
        found[name] = dist.version
        queue += [r.name for r in map(Requirement, dist.requires or []) if r.marker is None
                  or r.marker.evaluate({'extra':''})]
    return found

def pack(out, data, weights=None, quality=95, wheels=None, python=None):
    "Fill the folder `out`."
    out.mkdir(parents=True) # Refuses a folder that is there
    for o in ('dropclass','benchmarks','tests'):
        shutil.copytree(ROOT/o, out/'code'/o, ignore=shutil.ignore_patterns('__pycache__'))
    for o in ('pyproject.toml','settings.ini'): shutil.copy(ROOT/o, out/'code')
    if weights: shutil.copytree(weights, out/'weights')
    commit = subprocess.run(['git', '-C', ROOT, 'rev-parse', '--short=10', 'HEAD'], capture_output=True,
                            text=True).stdout.strip()
    (out/'code'/'COMMIT').write_text(commit or 'unknown')
    pack_images(data, out/'camvid.tar', quality)
    (out/'go.sh').write_text(GO)
    if wheels is not None:
        found = {o:distribution(o).version for o in wheels} if wheels else needed(NEEDS)
        wanted = [f'{k}=={v}' for k,v in sorted(found.items())]
        other = ['--python-version', python] if python else []
        subprocess.run([sys.executable, '-m', 'pip', 'download', '--quiet', '--no-deps', '--only-binary', ':all:',
                        *other,
                        '--dest', out/'wheels', *wanted], check=True)
    size = sum(o.stat().st_size for o in out.rglob('*') if o.is_file())/2**20
    print(f"{out}: {size:.0f} MiB; there: sh {out.name}/go.sh gpu --jobs 6")

def main():
    parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument('out', type=Path, help='folder to make')
    parser.add_argument('--data', type=Path, required=True, help="SegNet's copy of CamVid")
    parser.add_argument('--weights', type=Path, help='folder of the file of trained weights that a plan names')
    parser.add_argument('--quality', type=int, default=95, help='JPEG quality of the images; 0 copies the files')
    parser.add_argument('--wheels', nargs='*', metavar='NAME',
                        help='add wheels of these, or, without a name, of all that dropclass needs beside torch and '
                             'torchvision')
    parser.add_argument('--python', metavar='VERSION',
                        help='version of Python there, such as 3.12, for the wheels; that of this one')
    args = parser.parse_args()
    pack(args.out, args.data, args.weights, args.quality, args.wheels, args.python)

if __name__=='__main__': main()
