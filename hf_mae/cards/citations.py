"""BibTeX of the work that weights build on, by what the records say."""

from __future__ import annotations

from hf_mae.cards.records import Records

MAE = """@inproceedings{he2022masked,
  title     = {Masked Autoencoders Are Scalable Vision Learners},
  author    = {He, Kaiming and Chen, Xinlei and Xie, Saining and Li, Yanghao and Doll{\\'a}r, Piotr and Girshick, Ross},
  booktitle = {IEEE/CVF Conference on Computer Vision and Pattern Recognition (CVPR)},
  year      = {2022}
}"""
RSB = """@article{wightman2021resnet,
  title   = {ResNet strikes back: An improved training procedure in timm},
  author  = {Wightman, Ross and Touvron, Hugo and J{\\'e}gou, Herv{\\'e}},
  journal = {arXiv preprint arXiv:2110.00476},
  year    = {2021}
}"""
REXNET = """@inproceedings{han2021rethinking,
  title     = {Rethinking Channel Dimensions for Efficient Model Design},
  author    = {Han, Dongyoon and Yun, Sangdoo and Heo, Byeongho and Yoo, YoungJoon},
  booktitle = {IEEE/CVF Conference on Computer Vision and Pattern Recognition (CVPR)},
  year      = {2021}
}"""
TIMM = """@misc{rw2019timm,
  title        = {PyTorch Image Models},
  author       = {Wightman, Ross},
  year         = {2019},
  howpublished = {\\url{https://github.com/huggingface/pytorch-image-models}},
  doi          = {10.5281/zenodo.4414861}
}"""

_OF_ARCHITECTURE = (("rexnet", REXNET),)
_OF_SOURCE = (("strikes back", RSB), ("Wightman", RSB))


def citations(records: Records) -> list[str]:
    """Return the entries that apply to a model."""
    found: list[str] = []
    architecture = str(records.config.get("architecture", ""))
    if records.export["library"] != "timm" or architecture.startswith("vit_"):
        found.append(MAE)
    found += [entry for start, entry in _OF_ARCHITECTURE if architecture.startswith(start)]
    source = str(records.recipe.get("source", ""))
    found += [entry for word, entry in _OF_SOURCE if word in source]
    if records.export["library"] == "timm":
        found.append(TIMM)
    return list(dict.fromkeys(found))
