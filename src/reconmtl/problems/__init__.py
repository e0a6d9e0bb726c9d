"""Ready problems, one file each: `make(**options) -> Problem` and `PRESETS`, the first of which is the default."""

READY = {
    "multifashion": "Multi-Fashion+MNIST: a digit and a garment in one image, classify both",
    "scenes": "Drawn rooms: labels, depth, normals and more per pixel, on SegNet, MTAN or MobileNetV2; no download",
    "planted": "Regression in which two of six shared layers are made to fight: the right answer is known",
}
