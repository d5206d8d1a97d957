"""Sources: the papers behind what a report says was done."""

from __future__ import annotations

SOURCES = {
    "nnunet": "Isensee F, Jaeger PF, Kohl SAA, Petersen J, Maier-Hein KH. nnU-Net: a self-configuring method for deep "
    "learning-based biomedical image segmentation. Nature Methods 18, 203–211 (2021). doi:10.1038/s41592-020-01008-z",
    "unet": "Ronneberger O, Fischer P, Brox T. U-Net: convolutional networks for biomedical image segmentation. "
    "MICCAI 2015, 234–241. doi:10.1007/978-3-319-24574-4_28",
    "unet3d": "Çiçek Ö, Abdulkadir A, Lienkamp SS, Brox T, Ronneberger O. 3D U-Net: learning dense volumetric "
    "segmentation from sparse annotation. MICCAI 2016, 424–432. doi:10.1007/978-3-319-46723-8_49",
    "resenc": "Isensee F, Wald T, Ulrich C, et al. nnU-Net revisited: a call for rigorous validation in 3D medical "
    "image segmentation. MICCAI 2024, 488–498. doi:10.1007/978-3-031-72114-4_47",
    "instance": "Ulyanov D, Vedaldi A, Lempitsky V. Instance normalization: the missing ingredient for fast "
    "stylization. arXiv:1607.08022 (2016)",
    "dice": "Milletari F, Navab N, Ahmadi S-A. V-Net: fully convolutional neural networks for volumetric medical "
    "image segmentation. 3DV 2016, 565–571. doi:10.1109/3DV.2016.79",
    "nsd": "Nikolov S, Blackwell S, Zverovitch A, et al. Clinically applicable segmentation of head and neck anatomy "
    "for radiotherapy. J Med Internet Res 23, e26151 (2021). doi:10.2196/26151",
    "bootstrap": "Efron B. Better bootstrap confidence intervals. J Am Stat Assoc 82, 171–185 (1987). "
    "doi:10.1080/01621459.1987.10478410",
    "attention": "Oktay O, Schlemper J, Le Folgoc L, et al. Attention U-Net: learning where to look for the pancreas. "
    "arXiv:1804.03999 (2018)",
    "unetpp": "Zhou Z, Siddiquee MMR, Tajbakhsh N, Liang J. UNet++: a nested U-Net architecture for medical image "
    "segmentation. DLMIA 2018, 3–11. doi:10.1007/978-3-030-00889-5_1",
    "resnet": "He K, Zhang X, Ren S, Sun J. Deep residual learning for image recognition. CVPR 2016, 770–778. "
    "doi:10.1109/CVPR.2016.90",
    "transunet": "Chen J, Lu Y, Yu Q, et al. TransUNet: transformers make strong encoders for medical image "
    "segmentation. arXiv:2102.04306 (2021)",
    "swinunetr": "Hatamizadeh A, Nath V, Tang Y, Yang D, Roth HR, Xu D. Swin UNETR: Swin transformers for semantic "
    "segmentation of brain tumors in MRI images. BrainLes 2021, 272–284. doi:10.1007/978-3-031-08999-2_22",
    "unetr": "Hatamizadeh A, Tang Y, Nath V, et al. UNETR: transformers for 3D medical image segmentation. WACV 2022, "
    "574–584. doi:10.1109/WACV51458.2022.00181",
    "segresnet": "Myronenko A. 3D MRI brain tumor segmentation using autoencoder regularization. BrainLes 2018, "
    "311–320. doi:10.1007/978-3-030-11726-9_28",
    "mednext": "Roy S, Koehler G, Ulrich C, et al. MedNeXt: transformer-driven scaling of ConvNets for medical image "
    "segmentation. MICCAI 2023, 405–415. doi:10.1007/978-3-031-43901-8_39",
}

NETWORKS: dict[str, tuple[str, ...]] = {
    "plain": (),
    "residual": ("resenc",),
    "unet2015": ("unet",),
    "attention": ("attention",),
    "unetpp": ("unetpp",),
    "resnet-unet": ("resnet",),
    "transunet": ("transunet",),
    "swinunetr": ("swinunetr",),
    "unetr": ("unetr",),
    "segresnet": ("segresnet",),
    "mednext": ("mednext",),
}
"""What to cite for each name of a network in a plan, beside the sources of the U-Net itself."""
