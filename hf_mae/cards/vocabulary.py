"""What the Hub knows: the tasks, libraries, licences and languages that a card may name.

Small tables, so that a card can be checked without asking the Hub. Sources: @huggingface/tasks 0.21.54
(PIPELINE_TYPES_SET, LIBRARY_TASK_MAPPING) and huggingface/hub-docs (repositories-licenses.md, commit 008d54d); the
languages are ISO 639-1. Only libraries that we publish for are listed.
"""

from __future__ import annotations

import re

_PIPELINE_TAGS = """
text-classification token-classification table-question-answering question-answering zero-shot-classification
translation summarization feature-extraction text-generation fill-mask sentence-similarity text-to-speech
text-to-audio automatic-speech-recognition audio-to-audio audio-classification audio-text-to-text
voice-activity-detection depth-estimation image-classification object-detection image-segmentation text-to-image
image-to-text image-to-image image-to-video unconditional-image-generation video-classification
reinforcement-learning robotics tabular-classification tabular-regression tabular-to-text table-to-text
multiple-choice text-ranking text-retrieval time-series-forecasting text-to-video image-text-to-text
image-text-to-image image-text-to-video visual-question-answering document-question-answering
zero-shot-image-classification graph-ml mask-generation zero-shot-object-detection text-to-3d image-to-3d
image-feature-extraction video-text-to-text keypoint-detection visual-document-retrieval any-to-any video-to-video
other
"""

PIPELINE_TAGS = frozenset(_PIPELINE_TAGS.split())

LIBRARY_TASKS: dict[str, frozenset[str] | None] = {
    "transformers": frozenset(
        {
            "depth-estimation",
            "image-classification",
            "image-feature-extraction",
            "image-segmentation",
            "image-to-image",
            "mask-generation",
            "object-detection",
        }
    ),
    "timm": frozenset({"image-classification", "image-feature-extraction"}),
    "hf_mae": None,
    "onnx": None,
}
"""Tasks of pictures that the Hub offers a widget for, by library; None is a library that it has none for."""

_LICENSES = """
apache-2.0 mit openrail bigscience-openrail-m creativeml-openrail-m bigscience-bloom-rail-1.0 bigcode-openrail-m
afl-3.0 artistic-2.0 bsl-1.0 bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear c-uda cc cc0-1.0 cc-by-2.0 cc-by-2.5
cc-by-3.0 cc-by-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nd-4.0 cc-by-nc-nd-3.0
cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cdla-sharing-1.0 cdla-permissive-1.0
cdla-permissive-2.0 wtfpl ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1 eupl-1.2 agpl-3.0 gfdl gpl gpl-2.0 gpl-3.0
lgpl lgpl-2.1 lgpl-3.0 isc lppl-1.3c ms-pl mpl-2.0 odc-by odbl openrail++ osl-3.0 postgresql ofl-1.1 ncsa unlicense
zlib pddl lgpl-lr deepfloyd-if-license llama2 llama3 llama3.1 llama3.2 llama3.3 llama4 gemma
fair-noncommercial-research-license unknown other
"""

LICENSES = frozenset(_LICENSES.split())

_LANGUAGES = """
aa ab ae af ak am an ar as av ay az ba be bg bh bi bm bn bo br bs ca ce ch co cr cs cu cv cy da de dv dz ee el en eo
es et eu fa ff fi fj fo fr fy ga gd gl gn gu gv ha he hi ho hr ht hu hy hz ia id ie ig ii ik io is it iu ja jv ka kg
ki kj kk kl km kn ko kr ks ku kv kw ky la lb lg li ln lo lt lu lv mg mh mi mk ml mn mr ms mt my na nb nd ne ng nl nn
no nr nv ny oc oj om or os pa pi pl ps pt qu rm rn ro ru rw sa sc sd se sg si sk sl sm sn so sq sr ss st su sv sw ta
te tg th ti tk tl tn to tr ts tt tw ty ug uk ur uz ve vi vo wa wo xh yi yo za zh zu
"""

LANGUAGES = frozenset(_LANGUAGES.split())

LICENSE_NAME = r"[a-z0-9.-]+"
"""Pattern of `license_name`, the Hub's."""


def is_noncommercial(license_id: str) -> bool:
    """Return whether a licence of the Hub forbids commercial use."""
    return "-nc" in license_id or "noncommercial" in license_id


def is_language(code: str) -> bool:
    """Return whether the Hub takes this as a language: ISO 639-1 or three letters, with BCP-47 subtags or without."""
    first, _, rest = code.partition("-")
    private = re.fullmatch(r"q[a-t][a-z]", first) is not None  # ISO 639-2 keeps them for local use
    known = first in LANGUAGES or (re.fullmatch(r"[a-z]{3}", first) is not None and not private)
    known = known or code in {"multilingual", "code"}
    return known and re.fullmatch(r"(?:[A-Za-z0-9]{2,8}(?:-|$))*", rest) is not None


def is_hub_id(name: str) -> bool:
    """Return whether a name has the form of a repository: ORG/NAME."""
    return re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", name) is not None and ".." not in name
