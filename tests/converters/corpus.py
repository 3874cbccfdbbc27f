"""Malicious pickles, by what they try. None of them may run anything, and each must be refused with a clear error.

They are written opcode by opcode where ``pickle`` would not write them. Those with files of PyTorch are in test_torch_files.py, those with
safetensors in test_safetensors_file.py.
"""

from __future__ import annotations

import builtins
import importlib
import os
import pickle
import struct
import subprocess

import numpy as np


class Call:
    """Pickles as a call of ``function``."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


class Restored:
    """Pickles as an object whose state is set by a call of ``function``."""

    def __init__(self, function, state):
        self.call = function, state

    def __reduce__(self):
        return np.ndarray, ((0,),), self.call[1], None, None, self.call[0]


def text(value: str) -> bytes:
    """The opcode for a text of up to 255 bytes."""
    return b"\x8c" + bytes([len(value)]) + value.encode()


def call(module: str, name: str, *arguments: bytes) -> bytes:
    """The opcodes of a call."""
    return f"c{module}\n{name}\n(".encode() + b"".join(arguments) + b"tR"


def payload(data: bytes) -> bytes:
    """The opcode for bytes."""
    return b"B" + struct.pack("<I", len(data)) + data


RUN = "os.mkdir('was-run')"
SYSTEM = call("os", "system", text("mkdir was-run"))
DTYPE = call("numpy", "dtype", text("f4"))
EMPTY = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(K\x00t" + b"C\x01b" + b"tR"
LATIN1 = text("latin1")
ORDERED_DICT = b"ccollections\nOrderedDict\n"
SHARED = EMPTY + b"(K\x01M\x10\x27\x85" + DTYPE + b"\x89" + payload(bytes(40_000)) + b"tb"
LONE_STORAGE = (
    pickle.dumps(0x1950A86A20F9469CFC6C, 2)
    + pickle.dumps(1001, 2)
    + pickle.dumps({"little_endian": True}, 2)
    + b"\x80\x02("
    + text("storage")
    + b"ctorch\nFloatStorage\n"
    + text("0")
    + text("cpu")
    + b"K\x04tQ."
    + pickle.dumps(["0"], 2)
    + struct.pack("<q", 4)
    + bytes(16)
)
STORAGE = call("torch.storage", "_load_from_bytes", payload(LONE_STORAGE))
PAIRS = b"](" + b"".join(b"](" + text(f"{n}") + b"Ne" for n in range(1000)) + b"e"
LAUGHS = b"](" + 10 * text("lol") + b"e" + 60 * (b"q\x000](" + 10 * b"h\x00" + b"e")

PICKLES = {
    "os.system and its like": {
        "os.mkdir": pickle.dumps({"model": Call(os.mkdir, "was-run")}),
        "os.system, text protocol": b"cos\nsystem\n(S'mkdir was-run'\ntR.",
        "os.system, inner value": pickle.dumps({"model": {"a": Call(os.system, "mkdir was-run")}}, 2),
        "os.system, as a key": b"}" + SYSTEM + b"Ns.",
        "os.system, beside the model": b"}(" + text("model") + b"}" + text("a") + SHARED + b"s" + text("optimizer") + SYSTEM + b"u.",
        "os.system, popped from the stack": SYSTEM + b"0}.",
        "os.system, by a name of Python 2": b"cposix\nsystem\n(S'mkdir was-run'\ntR.",
        "os.execv": pickle.dumps(Call(os.execv, "/bin/mkdir", ["mkdir", "was-run"])),
        "subprocess.Popen": pickle.dumps(Call(subprocess.Popen, ["mkdir", "was-run"])),
        "pty.spawn": call("pty", "spawn", text("mkdir was-run")) + b".",
    },
    "builtins.eval and its like": {
        "eval": pickle.dumps(Call(eval, f"__import__('os') and {RUN}")),
        "exec": pickle.dumps(Call(exec, f"import os; {RUN}")),
        "exec, by its name of Python 2": pickle.dumps(Call(exec, f"import os; {RUN}"), 2),
        "compile": pickle.dumps(Call(compile, RUN, "", "exec")),
        "getattr": pickle.dumps(Call(getattr, "x", "__class__")),
        "open": pickle.dumps(Call(open, "was-run", "w")),
        "globals": pickle.dumps(Call(builtins.globals)),
        "a call of a type that is only a name": b"cbuiltins\ndict\n(](](" + text("a") + b"NeetR.",
    },
    "imports": {
        "__import__": pickle.dumps(Call(__import__, "this")),
        "importlib.import_module": pickle.dumps(Call(importlib.import_module, "this")),
        "importlib.reload": call("importlib", "reload", b"N") + b".",
        "runpy.run_path": call("runpy", "run_path", text("was-run.py")) + b".",
        "a module that is imported by its name": b"cthis\nd\n.",
        "dotted name of an allowed module": b"\x80\x04" + text("numpy") + text("ndarray.__class__") + b"\x93.",
        "a path for a module": b"c/tmp/evil\nrun\n.",
        "a name with a line break": b"\x80\x04" + text("numpy\nos") + text("dtype") + b"\x93.",
        "allowed name, other module": b"cos\n_reconstruct\n.",
        "a name of 1 MB": b"\x80\x04X\x40\x42\x0f\x00" + 1_000_000 * b"a" + text("x") + b"\x93.",
    },
    "nested __reduce__": {
        "a call in a call's arguments": pickle.dumps(Call(len, Call(os.mkdir, "was-run"))),
        "a call as the function": SYSTEM + b"(tR.",
        "a call for an allowed function's argument": b"cnumpy\ndtype\n(" + SYSTEM + b"tR.",
        "a call for a Counter's argument": b"ccollections\nCounter\n(" + SYSTEM + b"tR.",
        "a call in a default": b"ccollections\ndefaultdict\n(cos\nsystem\ntR.",
        "a default that can be called": b"ccollections\ndefaultdict\n(cnumpy\ndtype\ntR.",
        "a default of its own": b"ccollections\ndefaultdict\n(" + text("os.system") + b"tR.",
        "a call in an array's state": b"}" + text("a") + EMPTY + b"(K\x01K\x00\x85" + DTYPE + b"\x89" + SYSTEM + b"tbs.",
        "a call as a state's setter": pickle.dumps(Restored(os.mkdir, "was-run")),
        "10 000 nested calls": 10_000 * b"cnumpy\ndtype\n(" + 10_000 * b"tR" + b".",
        "copyreg._reconstructor": b"ccopyreg\n_reconstructor\n(cos\n_Environ\nc__builtin__\nobject\nNtR.",
        "operator.attrgetter": call("operator", "attrgetter", text("system")) + b".",
        "functools.partial": b"cfunctools\npartial\n(cos\nsystem\n" + text("mkdir was-run") + b"tR.",
    },
    "instances of classes": {
        "instance, text protocol": b"(S'mkdir was-run'\nios\nsystem\n.",
        "instance, obj": b"(cos\nsystem\nS'mkdir was-run'\no.",
        "instance, newobj": b"\x80\x02cos\nsystem\n(S'mkdir was-run'\nt\x81.",
        "instance, newobj of an array": b"\x80\x02cnumpy\nndarray\n(K\x04t\x81.",
        "instance, newobj_ex": b"\x80\x04" + text("os") + text("system") + b"\x93(S'mkdir was-run'\nt}\x92.",
        "state of a function": b"cnumpy.core.multiarray\n_reconstruct\n}" + text("__code__") + b"Nsb.",
        "state of a class": ORDERED_DICT + b"}" + text("update") + b"Nsb.",
        "state of a dict that is no dict": ORDERED_DICT + b")R(" + text("__class__") + b"Nlb.",
        "extension code": b"\x80\x02\x82\x01.",
    },
    "persistent ids": {
        "persistent id, text protocol": b"(dS'model'\nPmkdir was-run\ns.",
        "persistent id of text": b"}" + text("model") + text("id") + b"Qs.",
        "persistent id of a call": b"}" + text("model") + SYSTEM + b"Qs.",
        "persistent id of another module": b"(" + text("module") + b"cos\nsystem\nNNNtQ.",
        "persistent id of another type": b"(" + text("storage") + b"cos\nsystem\n" + text("0") + text("cpu") + b"K\x04tQ.",
        "persistent id of nothing": b"(tQ.",
    },
    "arrays of objects, and other false arrays": {
        "object array": pickle.dumps({"a": np.array([Call(os.mkdir, "was-run"), None], dtype=object)}),
        "dtype of objects": call("numpy", "dtype", text("O")) + b".",
        "dtype of objects, by its size": call("numpy", "dtype", text("|O8")) + b".",
        "dtype that is a call": b"cnumpy\ndtype\n(cos\nsystem\ntR.",
        "record dtype": pickle.dumps({"a": np.zeros(2, [("x", "f4")])}),
        "record dtype, by its state": DTYPE + b"(K\x03" + text("<") + b"N(" + text("x") + b"t}J\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb.",
        "string dtype": pickle.dumps({"a": np.array(["text"])}),
        "dates": pickle.dumps({"a": np.array(["2020-01-01"], "datetime64[D]")}),
        "array of a subclass": b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nmatrix\n(K\x00tC\x01btR.",
        "numpy.load": call("numpy", "load", text("was-run.npy")) + b".",
        "numpy.fromfile": call("numpy", "fromfile", text("/etc/passwd")) + b".",
        "numpy.memmap": call("numpy", "memmap", text("was-run"), text("f4"), text("w+")) + b".",
        "numpy.f2py": call("numpy.f2py", "compile", text(RUN)) + b".",
        "item of a dtype": DTYPE + b"K\x00K\x00s.",
        "append to an array": EMPTY + b"K\x00a.",
        "array filled twice": EMPTY + 2 * (b"(K\x01K\x00\x85" + DTYPE + b"\x89C\x00tb") + b".",
        "array larger than its data": EMPTY + b"(K\x01J\xff\xff\xff\x7f\x85" + DTYPE + b"\x89C\x04abcdtb.",
        "array of negative size": EMPTY + b"(K\x01J\xff\xff\xff\xff\x85" + DTYPE + b"\x89C\x00tb.",
        "array of many axes": EMPTY + b"(K\x01(" + 100 * b"K\x01" + b"t" + DTYPE + b"\x89C\x04abcdtb.",
        "empty array of 2^200": b"}" + text("a") + EMPTY + b"(K\x01(\x8a\x1a" + bytes(25) + b"\x01K\x00t" + DTYPE + b"\x89C\x00tbs.",
        "empty array of 2^46 by 2^46": b"}"
        + text("a")
        + EMPTY
        + b"(K\x01("
        + 2 * (b"\x8a\x06" + bytes(5) + b"\x40")
        + b"K\x00t"
        + DTYPE
        + b"\x89C\x00tbs.",
        "array in an order of its own": b"}"
        + text("a")
        + call("numpy.core.numeric", "_frombuffer", b"C\x04abcd", DTYPE, b"K\x01\x85", text("A"))
        + b"s.",
        "set": b"\x80\x04\x8f(" + text("a") + b"\x90.",
        "out-of-band buffer": b"\x80\x05\x97.",
    },
    "PyTorch's functions": {
        "tensor without arguments": b"ctorch._utils\n_rebuild_tensor_v2\n)R.",
        "tensor of a call": b"ctorch._utils\n_rebuild_tensor_v2\n(" + SYSTEM + b"K\x00)))}tR.",
        "tensor of numbers": b"ctorch._utils\n_rebuild_tensor_v2\n(](K\x01eK\x00K\x01\x85K\x01\x85\x89}tR.",
        "tensor far beyond its storage": call(
            "torch._utils", "_rebuild_tensor_v2", STORAGE, b"J\xff\xff\xff\x7f", b"K\x04\x85", b"K\x01\x85", b"\x89}"
        )
        + b".",
        "tensor with strides of 2^300": b"}"
        + text("a")
        + call("torch._utils", "_rebuild_tensor_v2", STORAGE, b"K\x00", b"K\x01\x85", b"\x8a\x27" + bytes(38) + b"\x01\x85", b"\x89}")
        + b"s.",
        "tensor whose type is a call": b"ctorch._tensor\n_rebuild_from_type_v2\n(cos\nsystem\ncos\nsystem\n(tNtR.",
        "tensor from another function": b"ctorch._utils\n_rebuild_device_tensor_from_numpy\n)R.",
        "tensor by numpy": b"ctorch\nfrom_numpy\n)R.",
        "parameter that is none": call("torch._utils", "_rebuild_parameter", SYSTEM, b"\x89}") + b".",
        "parameter with a state": b"ctorch._utils\n_rebuild_parameter_with_state\n)R.",
        "storage from bytes": call("torch.storage", "_load_from_bytes", b"C\x00") + b".",
        "storage from a pickle": call("torch.storage", "_load_from_bytes", payload(b"cos\nsystem\n(S'mkdir was-run'\ntR.")) + b".",
        "storage with a pickle in its header": call(
            "torch.storage", "_load_from_bytes", payload(LONE_STORAGE.replace(b"\x88s.", b"cos\nsystem\n)Rs."))
        )
        + b".",
        "storage of 2^62": call("torch.storage", "_load_from_bytes", payload(LONE_STORAGE[:-24] + struct.pack("<q", 2**62))) + b".",
        "call of a storage type": b"ctorch\nFloatStorage\n(J\xff\xff\xff\x7ftR.",
        "torch.load": call("torch", "load", text("was-run")) + b".",
        "torch.hub.load": call("torch.hub", "load", text("evil/repository"), text("model")) + b".",
        "torch.jit": call("torch.jit._pickle", "restore_type_tag", b"N", text("x")) + b".",
        "torch.utils": call("torch.utils.cpp_extension", "load_inline", text("x"), text("int x;")) + b".",
        "a module": b"ctorch.nn.modules.container\nSequential\n)\x81}b.",
        "a model of fvcore": b"cfvcore.common.checkpoint\n_IncompatibleKeys\n)R.",
    },
    "memo bombs": {
        "memo index of 4 billion": b"}r\xff\xff\xff\xff.",
        "memo index of 400 digits": b"}p" + 400 * b"9" + b"\n.",
        "memo index below 0": b"}p-1\n.",
        "memo index that is not there": b"}h\x07.",
        "50 000 memo indices of one hash": b"}" + b"".join(b"p%d\n" % (n * (2**61 - 1)) for n in range(50_000)) + b".",
        "30 000 memos": b"}" + 30_000 * b"\x94" + b"(.",
        "dict in itself": b"}q\x00" + text("model") + b"h\x00s.",
        "list in itself": b"]q\x00h\x00a.",
        "one array under 1000 names": b"}"
        + text("x")
        + SHARED
        + b"q\x00s"
        + b"".join(text(f"x{n}") + b"h\x00s" for n in range(1000))
        + b".",
    },
    "billion laughs": {
        "10^60 laughs": LAUGHS + b".",
        "10^60 laughs as a model": b"}" + text("model") + LAUGHS + b"s.",
        "10^60 laughs as a key": b"}" + LAUGHS + b"Ns.",
        "key of tuples, 2^60 to hash": b"}" + b")" + 60 * b"2\x86" + b"Ns.",
        "key of 100 000 nested tuples": b"}" + b")" + 100_000 * b"\x85" + b"Ns.",
        "30 000 nested lists": b"}" + text("model") + 30_000 * b"]" + 29_999 * b"a" + b"s.",
        "30 000 nested dicts": 30_000 * (b"}" + text("a")) + b"N" + 30_000 * b"s" + b".",
        "one text encoded 1000 times": b"X\x10\x27\x00\x00"
        + 10_000 * b"a"
        + b"q\x00]"
        + 1000 * (b"c_codecs\nencode\nh\x00" + LATIN1 + b"\x86Ra")
        + b".",
        "10 000 bytes as a key 10 000 times": payload(10_000 * b"a") + b"q\x00]" + 10_000 * b"}h\x00Nsa" + b".",
        "10 000 bytes as a storage's name 1000 times": payload(10_000 * b"a")
        + b"q\x00]"
        + 1000 * (b"(" + text("storage") + b"ctorch\nFloatStorage\nh\x00" + text("cpu") + b"K\x04tQa")
        + b".",
        "1000 items copied 1000 times": PAIRS + b"q\x00" + ORDERED_DICT + b"q\x01](" + 1000 * b"h\x01h\x00\x85R" + b"e.",
        "one storage unpacked 60 000 times": payload(LONE_STORAGE)
        + b"q\x00]"
        + 60_000 * b"ctorch.storage\n_load_from_bytes\nh\x00\x85Ra"
        + b".",
        "other codec": call("_codecs", "encode", text("x"), text("bz2")) + b".",
    },
    "false sizes": {
        "8 EiB of bytes": b"\x8e" + b"\xff" * 7 + b"\x7f" + b"abc.",
        "8 EiB of text": b"\x8d" + b"\xff" * 7 + b"\x7f" + b"abc.",
        "2 GiB of text": b"X\xff\xff\xff\x7fabc.",
        "4 GiB of bytes": b"B\xff\xff\xff\xffabc.",
        "frame of 8 EiB": b"\x80\x04\x95" + b"\xff" * 7 + b"\x7f" + b"}.",
        "bytes of a number": b"c__builtin__\nbytes\n(J\xff\xff\xff\x7ftR.",
        "number of 100 000 digits": b"L" + 100_000 * b"9" + b"L\n.",
        "number of 2 GiB": b"\x8b\xff\xff\xff\x7f.",
        "line without an end": b"I" + 100_000 * b"9",
        "an escape without an end": b"S'" + 10_000 * b"\\" + b"x'\n.",
        "half a surrogate": b"(dV\\ud800\nNs.",
        "two keys": b"}(" + text("a") + b"N" + text("a") + b"Nu.",
        "a key without a value": b"}(" + text("a") + b"u.",
        "protocol 255": b"\x80\xff}.",
        "nothing": b"",
        "an end only": b".",
    },
}
"""Group → kind → a pickle."""
