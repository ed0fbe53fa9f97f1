"""The built-in vocabulary: byte-level BPE trained on text that ships with Python, for models that need no download.

Same pattern, normalisation and control-token names as Qwen2.5, a few thousand tokens. Training is deterministic for a
Python version and takes about two seconds; the result is kept in ``$QWEN_CACHE`` or the repository's ``.cache/``.
"""

from __future__ import annotations

import ast
import hashlib
import json
import os
import sys
import tempfile
from functools import lru_cache
from pathlib import Path

from research.core.errors import DataError
from research.core.text.bytelevel import ByteLevelTokenizer
from research.core.text.save import config_fields, tokenizer_json, write_text
from research.core.text.specials import FAMILY_SPECIALS, PATTERN, VISIBLE
from research.core.text.vocabulary import Added, Vocabulary, assemble, read_tokenizer_json

BASE_TOKENS = 3050  # with the 22 control tokens of Qwen2.5: 3072, a multiple of 64
_RECIPE = 1  # part of the cache's name: counts the changes to how the text is chosen

# Documented modules that every installation has, Debian's python3-minimal included.
_MODULES = """
    argparse ast calendar collections/__init__ copy csv datetime difflib doctest email/message fractions functools
    getopt gettext glob gzip heapq json/__init__ logging/__init__ optparse os pathlib pickle pprint random
    re/__init__ shutil socket statistics string subprocess tarfile tempfile textwrap threading tokenize typing
    unittest/case urllib/parse warnings zipfile
"""

# Characters of instructions in Chinese; each is made one token.
_CHINESE = (
    "的一是不了在有人我他这个们中来上大为和国地到以说时要就出会可也你对生能而子那得于着下自之年过发后作里用道行所然家种事成方多"
    "经么去法学如都同现当没动面起看定天分还进好小部其些主样理心本前开但因只从想实日军者意无力它与长把机十民第公此已工使情明性知"
    "全三又关点正业外将两高间由问很最重并物手应向头文体政美相见被利什二等产或新己制身果加西斯月话合回特代内信表化老给世位次度门"
    "任常先海通教儿原东声提立及比员解水名真论处走义各入几口认条平系气题活尔更别打女变四神总何电数安少报才结反受目太量再感建务做接"
    "必场件计管期市直德资命山金指克许统区保至队形社便空决治展马科司五基眼书非则听白却界达光放强即像难且权思王象完设式色路记南品住"
    "告类求据程北边死张该交规万取拉格望觉术领共确传师观清今切院让识候带导争运笔零六七八九百千亿加减乘除于差积商余倒序反转排列升降"
    "复制抄写字母词句首尾奇偶单双星期昨早晚午夜时钟秒刻周米厘毫升克斤吨里英寸尺码温摄氏华转换成换算等共含含有答案请问输出输入原样"
    "按照照顺序从到最大小值和均平方根负号点括串符英汉语文拼音苹果香蕉橙梨桃猫狗鸟鱼马牛羊鸡红黄蓝绿黑白紫春夏秋冬男女父母兄弟姐妹"
    "个只条本张把支块元角分钱买卖付找剩吃喝走跑飞游睡读您谢吗呢吧啊哪谁几怎每您再见朋友学校老师医院城市北京上海，。！？；：、（）《》“”"
)


@lru_cache(maxsize=1)
def builtin_tokenizer() -> ByteLevelTokenizer:
    """The built-in tokenizer, from the cache or trained now. Safe for several processes at once."""
    path = _cache_folder() / f"builtin-{sys.version_info[0]}.{sys.version_info[1]}-{_key()}.json"
    try:
        vocabulary = read_tokenizer_json(path)
        assert isinstance(vocabulary, Vocabulary)
    except DataError:  # not there yet, or damaged
        vocabulary = train_builtin()
        try:
            write_text(path, tokenizer_json(vocabulary))
        except OSError:  # no room or no right to keep it: it is trained again next time
            pass
    return _finished(vocabulary)


def _finished(vocabulary: Vocabulary) -> ByteLevelTokenizer:
    vocabulary.source = "built-in vocabulary"
    vocabulary.fields = config_fields(vocabulary, None) | {"vocabulary": "builtin"}
    return ByteLevelTokenizer(vocabulary, "qwen2_5")


def _cache_folder() -> Path:
    named = os.environ.get("QWEN_CACHE")
    if named:
        return Path(named).expanduser()
    own = Path(__file__).resolve().parents[3] / ".cache"
    return own if os.access(own.parent, os.W_OK) else Path(tempfile.gettempdir()) / f"qwen-workbench-{os.getuid()}"


@lru_cache(maxsize=1)
def corpus() -> tuple[str, ...]:
    """The texts trained on: Python's language reference (``pydoc_data.topics``), docstrings of its library, and a line
    per Chinese character.
    """
    texts = []
    try:
        from pydoc_data.topics import topics

        texts += [topics[name] for name in sorted(topics)]
    except ImportError:  # left out of some builds
        pass
    library = Path(os.__file__).parent
    for name in _MODULES.split():
        path = library / f"{name}.py"
        if path.is_file():
            texts += _docstrings(path.read_text(encoding="utf-8"))
    if len(texts) < 50:  # a build without sources: what is compiled into the interpreter
        import builtins

        texts += [str(getattr(builtins, name).__doc__) for name in sorted(dir(builtins))]
    # Often enough that each becomes one token; a digit between them, which joins nothing, keeps them apart.
    characters = sorted(set(_CHINESE))
    return (*texts, *("1".join(characters) for _ in range(200)))


def _docstrings(source: str) -> list[str]:
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    found = [ast.get_docstring(node) for node in ast.walk(ast.parse(source)) if isinstance(node, kinds)]
    return [text for text in found if text]


def _key() -> str:
    """Names what the vocabulary depends on: how it is made, and which Python's text it is made from."""
    recipe = [_RECIPE, BASE_TOKENS, PATTERN, FAMILY_SPECIALS["qwen2_5"], _MODULES, _CHINESE, sys.version, os.__file__]
    return hashlib.sha256(json.dumps(recipe).encode()).hexdigest()[:12]


def train_builtin() -> Vocabulary:
    """Train the vocabulary: 256 bytes, then merges by frequency."""
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

    library = Tokenizer(models.BPE())
    library.normalizer = normalizers.NFC()
    steps = [
        pre_tokenizers.Split(Regex(PATTERN), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]
    library.pre_tokenizer = pre_tokenizers.Sequence(steps)
    trainer = trainers.BpeTrainer(
        vocab_size=BASE_TOKENS,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    library.train_from_iterator(corpus(), trainer)
    names = FAMILY_SPECIALS["qwen2_5"]
    model = json.loads(library.to_str())["model"]
    added = {name: Added(len(model["vocab"]) + index, name not in VISIBLE) for index, name in enumerate(names)}
    path = Path("built-in vocabulary")
    return assemble(model["vocab"], [tuple(pair) for pair in model["merges"]], added, path, path)
