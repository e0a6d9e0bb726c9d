"""Ready problems, one file each: `make(**options) -> Problem` and `PRESETS`, the first of which is the default."""

READY = {
    "multifashion": "Multi-Fashion+MNIST: a digit and a garment in one image, classify both",
    "celeba": "CelebA's forty attributes on ResNet18; needs its folder, or takes made-up images",
    "cityscapes": "CityScapes' 7 classes and depth on SegNet or MTAN; needs MTAN's .npy files",
    "nyuv2": "NYUv2's 13 classes, depth and normals on MTAN or SegNet; needs MTAN's .npy files",
    "scenes": "Drawn rooms: labels, depth, normals and more per pixel, on SegNet, MTAN or MobileNetV2; no download",
    "planted": "Regression in which two of six shared layers are made to fight: the right answer is known",
}
