"""Ready problems, one file each: `make(**options) -> Problem` and `PRESETS`, the first of which is the default."""

READY = {
    "multifashion": "Multi-Fashion+MNIST: a digit and a garment in one image, classify both",
    "celeba": "CelebA's forty attributes on ResNet18; needs its folder, or takes made-up images",
    "cityscapes": "CityScapes' 7 classes and depth on SegNet or MTAN; needs MTAN's .npy files",
    "nyuv2": "NYUv2's 13 classes, depth and normals on MTAN or SegNet; needs MTAN's .npy files",
    "pascal_context": "PASCAL-Context's four or five dense tasks on MobileNetV2; needs the folder PASCAL_MT",
    "scenes": "Drawn rooms: labels, depth, normals and more per pixel, on SegNet, MTAN or MobileNetV2; no download",
    "qm9": "Eleven properties of molecules on a message-passing network; real data from the package qm9pack",
    "yeast": "Fourteen functional classes of genes on a small MLP; real data from the package river",
    "planted": "Regression in which two of six shared layers are made to fight: the right answer is known",
}
