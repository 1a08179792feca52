"""Labels that are not what they seem: negative ones, 32 bits, lossy files. None of them may become another class
without a word."""
import numpy as np
import pytest
import torch
from PIL import Image

from dropclass.core import ClassSpec
from dropclass.data.cityscapes import CITYSCAPES_LABEL_MAP
from dropclass.data.core import SegmentationItems, map_labels, pair_files, read_mask, write_toy_folder

SPEC = ClassSpec(('ground','wall','sky'))


@pytest.mark.parametrize('kind', [np.uint8, np.int16, np.uint16, np.int32, np.int64])
def test_labels_are_looked_up_one_by_one(kind):
    "Whatever the map names and the file holds, each pixel gets what a dict would give it."
    rng,info = np.random.default_rng(0),np.iinfo(kind)
    for _ in range(20):
        pool = np.unique([info.min, info.max, 0, 1,
                          *rng.integers(max(info.min, -70_000), min(info.max, 70_000), 6)]).astype(np.int64)
        labels = rng.choice(pool, (5,7)).astype(kind)
        label_map = {int(o):int(rng.integers(256)) for o in rng.choice(pool, 3)}
        expected = [[label_map.get(int(o), int(o)) for o in row] for row in labels]
        assert map_labels(labels, label_map).tolist()==expected


def test_negative_labels_are_refused_with_any_map(tmp_path):
    "With a map of another class and with none: -1 stays -1, and a class is never -1."
    Image.new('RGB', (4,1)).save(tmp_path/'a.png')
    Image.fromarray(np.array([[0,1,2,-1]], dtype=np.int32)).save(tmp_path/'m.tif')
    for label_map in (None, {2:1}, {0:255}):
        with pytest.raises(ValueError, match='m.tif holds label -1'):
            SegmentationItems([(tmp_path/'a.png', tmp_path/'m.tif')], SPEC, label_map=label_map)
    assert read_mask(tmp_path/'m.tif', label_map={-1:255}).tolist()==[[0,1,2,255]]
    # The licence plate, and what is nothing
    assert map_labels(np.array([-1,-2]), CITYSCAPES_LABEL_MAP).tolist()==[255,-2]


@pytest.mark.parametrize('name,options', [('m.jpg', {}), ('m.tif', dict(compression='jpeg')), ('m.jp2', {})])
def test_lossy_masks_are_refused(tmp_path, name, options):
    "All labels of this file are valid, and a fifth of them wrong."
    images,masks = write_toy_folder(tmp_path, n=2)
    (masks/'000.png').unlink()
    Image.new('L', (64,48), 1).save(masks/name.replace('m', '000'), **options)
    with pytest.raises(ValueError, match='does not keep every pixel.*PNG'):
        SegmentationItems(pair_files(images, masks), SPEC, cache=False)


def test_a_turned_jpeg_mask_is_a_jpeg_mask(tmp_path):
    exif = Image.Exif()
    exif[274] = 6
    Image.new('L', (8,4)).save(tmp_path/'m.jpg', exif=exif)
    with pytest.raises(ValueError, match='is a JPEG file'): read_mask(tmp_path/'m.jpg')


def test_lossless_packing_is_no_reason(tmp_path):
    Image.new('L', (8,4), 2).save(tmp_path/'m.tif', compression='tiff_lzw')
    assert read_mask(tmp_path/'m.tif').unique().tolist()==[2]
