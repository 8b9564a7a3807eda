"""BibTeX of the papers that cards name."""

RESNET = """@article{he2015deep,
  title = {Deep Residual Learning for Image Recognition},
  author = {He, Kaiming and Zhang, Xiangyu and Ren, Shaoqing and Sun, Jian},
  journal = {arXiv:1512.03385},
  year = {2015}
}
"""

MOBILENET_V2 = """@article{sandler2018mobilenetv2,
  title = {MobileNetV2: Inverted Residuals and Linear Bottlenecks},
  author = {Sandler, Mark and Howard, Andrew and Zhu, Menglong and Zhmoginov, Andrey and Chen, Liang-Chieh},
  journal = {arXiv:1801.04381},
  year = {2018}
}
"""

EFFICIENTNET = """@article{tan2019efficientnet,
  title = {EfficientNet: Rethinking Model Scaling for Convolutional Neural Networks},
  author = {Tan, Mingxing and Le, Quoc V.},
  journal = {arXiv:1905.11946},
  year = {2019}
}
"""

IMAGENET = """@article{russakovsky2014imagenet,
  title = {ImageNet Large Scale Visual Recognition Challenge},
  author = {Russakovsky, Olga and Deng, Jia and Su, Hao and others},
  journal = {arXiv:1409.0575},
  year = {2014}
}
"""

FASHION_MNIST = """@article{xiao2017fashion,
  title = {Fashion-MNIST: a Novel Image Dataset for Benchmarking Machine Learning Algorithms},
  author = {Xiao, Han and Rasul, Kashif and Vollgraf, Roland},
  journal = {arXiv:1708.07747},
  year = {2017}
}
"""

VIT = """@article{dosovitskiy2020image,
  title = {An Image is Worth 16x16 Words: Transformers for Image Recognition at Scale},
  author = {Dosovitskiy, Alexey and Beyer, Lucas and Kolesnikov, Alexander and others},
  journal = {arXiv:2010.11929},
  year = {2020}
}

@article{touvron2020training,
  title = {Training data-efficient image transformers and distillation through attention},
  author = {Touvron, Hugo and Cord, Matthieu and Douze, Matthijs and others},
  journal = {arXiv:2012.12877},
  year = {2020}
}
"""
