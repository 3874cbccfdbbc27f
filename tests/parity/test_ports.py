"""Ports of other models: the page about them is run as it is written, and whatever is missing, stale or wrong fails."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import re
import shlex
import shutil
import sys
from pathlib import Path

import keras
import numpy as np
import pytest

from converters import cli as convert_cli
from converters import ports
from converters.errors import ConversionError
from converters.rules import Drop, Rule
from converters.transforms import IDENTITY
from parity import check, judge, probes, stages
from parity import cli as parity_cli
from parity.ports import Port, inputs_of
from parity.replay import replay_port
from parity.tap_rules import Layout, TapRuleError
from parity.trace import Case, Trace

GOLDEN = Path(__file__).parents[1] / "golden"
PAGE = (Path(__file__).parents[2] / "docs" / "porting_another_model.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+) ?(\S*)\n(.*?)^```", PAGE, flags=re.MULTILINE | re.DOTALL)
"""Language, the rest of the line, and the code of every block."""

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning")  # Keras saves

ENVIRONMENT = functools.cache(probes.examine)

FILES = {name: code for language, name, code in BLOCKS if language == "python"}


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """The working directory: the files of the page, the weights and the traces that were recorded of them."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    for name, code in FILES.items():
        Path(name).write_text(code)
    shutil.copyfile(GOLDEN / "unet" / "unet.pth", "unet.pth")
    shutil.copyfile(GOLDEN / "fpn_head" / "fpn_head.pth", "fpn_head.pth")
    Path("trace").symlink_to(GOLDEN / "unet" / "trace")
    Path("fpn_trace").symlink_to(GOLDEN / "fpn_head" / "trace")
    monkeypatch.setattr(probes, "examine", ENVIRONMENT)  # once
    policy, floatx = keras.config.dtype_policy(), keras.config.floatx()
    yield tmp_path
    assert (keras.config.dtype_policy(), keras.config.floatx()) == (policy, floatx)
    forget()


def forget():
    """Lets changed files be imported again."""
    for name in FILES:
        sys.modules.pop(Path(name).stem, None)


@pytest.fixture
def port() -> Port:
    return ports.read("unet_port.py")


def run(command, capsys):
    """One line of the page: exit code, and all that it printed."""
    program, *arguments = shlex.split(command)
    code = {"convert": convert_cli, "parity-check": parity_cli}[program].main(arguments)
    captured = capsys.readouterr()
    return code, captured.out + captured.err


def apply(name, difference):
    """Changes a file by a block of the page."""
    before, after = ("".join(f"{line[1:]}\n" for line in difference.splitlines() if line[0] == sign) for sign in "-+")
    text = Path(name).read_text()
    assert text.count(before) == 1, before
    Path(name).write_text(text.replace(before, after))
    forget()


def test_the_page_is_true(capsys):
    output = ""
    for language, name, code in BLOCKS:
        if language == "diff":
            apply(name, code)
            changed = name
        elif language == "bash" and name != "torch":
            commands = code.splitlines()
            results = [run(command, capsys) for command in commands]
            output = "\n".join(text for _, text in results)
            codes = [code for code, _ in results]
        elif language == "text":
            for line in code.splitlines():
                assert " ".join(line.split()) in " ".join(output.split()), f"{line!r} is not in\n{output}"
            expected = 2 if "error: " in code else 1 if "mismatch: " in code or "failed: " in code else 0
            assert max(codes) == expected
            if expected:  # what was broken is whole again for the next block
                Path(changed).write_text(FILES[changed])
                forget()
    assert [language for language, *_ in BLOCKS].count("diff") == 4
    assert sorted(path.name for path in Path("report").iterdir()) >= ["error_along_depth.png", "junit.xml", "report.html", "report.json"]


def test_the_example_is_small():
    assert len([line for line in FILES["unet_port.py"].splitlines() if line.strip()]) <= 70


@pytest.mark.parametrize(("name", "trace"), [("unet", "trace"), ("fpn", "fpn_trace")])
def test_recording(name, trace, request, capsys):
    pytest.importorskip("torch")
    recorded = Path(trace).resolve()
    Path(trace).unlink()
    if name == "fpn":
        from parity import official

        official.load(*request.getfixturevalue("official_sources"))
        commands = [f"parity-check record --port fpn_port.py --src fpn_head.pth --out {trace}"]
    else:
        [code] = [code for language, name, code in BLOCKS if (language, name) == ("bash", "torch")]
        exec(compile(FILES["weights.py"], "weights.py", "exec"), {"__name__": "__main__"})
        assert Path("unet.pth").read_bytes() == (GOLDEN / "unet" / "unet.pth").read_bytes()
        python, *commands = code.splitlines()
        assert python == "python weights.py"
    with pytest.MonkeyPatch.context() as patch:
        for framework in ("tensorflow", "keras"):
            patch.setitem(sys.modules, framework, None)  # recording needs neither
        for command in commands:
            assert run(command, capsys)[0] == 0
    new, old = Trace(trace), Trace(recorded)
    assert new.cases == old.cases
    for case in new.cases:
        with new.case(case) as got, old.case(case) as wanted:
            for file, reference in ((got.reference, wanted.reference), (got.baseline, wanted.baseline)):
                tolerance = 1e-11 if file.dtype == "float64" else 1e-4
                assert list(file.records) == list(reference.records)
                assert file.facts.get("without_gradient") == reference.facts.get("without_gradient")
                for key in file.records:
                    values, expected = file.read(*key), reference.read(*key)
                    assert np.linalg.norm(values - expected) <= tolerance * np.linalg.norm(expected), key


def test_float32_is_judged_against_the_noise_of_the_official_runs(capsys):
    run("convert --port unet_port.py --src unet.pth --dst tf_unet", capsys)
    found = check.check(check.Settings("tf_unet", "trace", ("float32",), mode="eager", port="unet_port.py"))
    assert [item.name for case in found.cases for item in case.failures] == []
    assert 0.7 < found.median_ratio < 1.3  # taps this small are too few for the limit of 1.1
    assert all(item.error > 1e-8 for case in found.cases for item in case.items if item.group == "taps")


def test_recording_without_pytorch(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    code, text = run("parity-check record --port unet_port.py --src unet.pth --out new", capsys)
    assert code == 3
    assert text.startswith("error: cannot import torch: ")
    assert text.endswith("\n  pip install 'tfmaskformer[torch]'\n")
    assert not Path("new").exists()


def test_recording_refuses_what_it_cannot_use(capsys):
    pytest.importorskip("torch")
    for arguments, told in (
        ("--case absent", "port 'unet' has no case absent; it has one, batch"),
        ("--src fpn_head.pth", "'fpn_head.pth' does not fit the official model of port 'unet'"),
        ("--src absent.pth", "'absent.pth' does not exist"),
    ):
        code, text = run(f"parity-check record --port unet_port.py --src unet.pth --out new {arguments}", capsys)
        assert code == 2
        assert told in text
        assert not Path("new").exists()


def test_checking_needs_no_torch(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    assert run("convert --port fpn_port.py --src fpn_head.pth --dst tf_fpn_head", capsys)[0] == 0
    command = "parity-check --port fpn_port.py --ckpt tf_fpn_head --reference fpn_trace --dtype float64 --mode {}"
    for mode in ("eager", "xla"):
        code, text = run(command.format(mode), capsys)
        assert code == 0, text


# The ledger: what is missing, stale or wrong in a description fails the check, whichever line it is.


@pytest.fixture(scope="module")
def computed(tmp_path_factory):
    """What TensorFlow makes of the page's U-Net in float64: the port, the manifest, the model and the results of a case."""
    directory = tmp_path_factory.mktemp("unet")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", list(sys.path))
        for name, code in FILES.items():
            (directory / name).write_text(code)
        port = ports.read(str(directory / "unet_port.py"))
        manifest = ports.convert(port, GOLDEN / "unet" / "unet.pth", directory / "tf_unet")
        model = port.load(directory / "tf_unet", "float64")
        with Case(GOLDEN / "unet" / "trace", "batch") as case:
            results = port.run(model, inputs_of(case), "eager")
    forget()
    return port, manifest, model, results


def judged(computed, groups=None, **changes):
    """What fails of the case under a changed description or with other results, as "group name", and what is exempted."""
    port, manifest, model, results = computed
    port = dataclasses.replace(port, **changes)
    results = dataclasses.replace(results, groups=groups or results.groups, names=port.names)
    with Case(GOLDEN / "unet" / "trace", "batch") as case:
        run = judge.CaseRun(case, results, "float64", judge.loss_floors_of([case]), model, manifest=manifest)
        found, _ = check.judge_case(run, check.judges_of(port), stages.plan_of(port.stages), all_stages=True)
    return {f"{item.group} {item.name}": item.note for item in found.failures}, found.exempted


def without(mapping, name):
    return {key: value for key, value in mapping.items() if key != name}


def test_what_is_asked_of_maskformer_alone_is_refused(capsys):
    ports.convert(ports.read("fpn_port.py"), "fpn_head.pth", "tf_fpn_head")
    command = "parity-check --port fpn_port.py --ckpt tf_fpn_head --reference fpn_trace"
    for option in ("--padding masked", "--mode eager --memory-budget 1GB"):
        code, text = run(f"{command} {option}", capsys)
        assert code == 2
        assert "is for MaskFormer" in text
    code, text = run("parity-check --port fpn_port.py --ckpt tf_fpn_head --reference trace", capsys)
    assert (code, "other weights" in text) == (2, True)


def test_gradients_can_be_left_out(capsys):
    run("convert --port unet_port.py --src unet.pth --dst tf_unet", capsys)
    command = "parity-check --port unet_port.py --ckpt tf_unet --reference trace --case batch --dtype float64 --mode eager --no-gradients"
    code, text = run(command, capsys)
    assert code == 0, text
    reason = "it would show in a gradient, but this check was asked to leave gradients out"
    assert re.search(f"^  exempted: variables '.*'.*: {reason}$", text, re.M)


def test_a_true_description_passes(computed):
    failures, exempted = judged(computed)
    assert failures == {}
    assert {(exemption.group, exemption.name) for exemption in exempted} == {
        *((group, f"{layer}_{n}#0") for group in ("taps", "tap_gradients") for layer in ("pad", "join") for n in (0, 1)),
        *((group, name) for group in ("taps", "tap_gradients") for name in computed[0].partners),
        *(("sources", drop.source) for drop in computed[0].drops),
    }


def test_looking_changes_no_bit(computed):
    port, _, model, results = computed
    alone = port.run(model, port.inputs["batch"](), "eager", gradients="none", tapped=False)
    assert {group for group, tensors in alone.groups.items() if tensors} == {"outputs", "losses"}
    for group in ("outputs", "losses"):
        for name, tensor in alone.groups[group].items():
            assert np.array_equal(tensor, results.groups[group][name]), name


def test_a_replay_knows_partners_of_other_names(computed):
    port, _, model, _ = computed
    relus = {f"{block}.relu#0": f"{block.replace('.', '_')}_relu#0" for block in ("down.0", "down.1", "down.2", "merge.0", "merge.1")}
    partners = {official: (own, "a test") for official, own in relus.items()}
    layouts = [*port.layouts, *((own, port.layouts[0][1]) for own in relus.values())]
    with Case(GOLDEN / "unet" / "trace", "batch") as case:
        replayed = replay_port(dataclasses.replace(port, modules=(), partners=partners, layouts=layouts), model, case, gradients=True)
    for found in (replayed.errors, replayed.gradients):
        assert set(relus.values()) <= set(found)
        assert max(found.values()) < 1e-13
    assert "head.bias" in replayed.gradients


def test_every_module_call_has_a_partner_or_a_reason(computed):
    port = computed[0]
    alone = "no partner in the trace"
    assert judged(computed, exempt=without(port.exempt, ("taps", "pad_1#0")))[0] == {
        "taps pad_1#0": alone,
        "tap_gradients pad_1#0": alone,
    }
    assert "taps pad_1#0" in judged(computed, exempt=without(port.exempt, ("taps", "pad_1#0")) | {("taps", "pad_1"): "a prefix"})[0]
    assert judged(computed, partners=without(port.partners, "down.0#0"))[0] == {
        "taps down.0#0": "no partner in TensorFlow",
        "tap_gradients down.0#0": "no partner in TensorFlow",
    }


def test_stale_exemptions_and_partners_fail(computed):
    port = computed[0]
    for name in ("absent#0", "head#0"):
        for group in ("taps", "gradients", "variables"):
            [(failed, note)] = judged(computed, exempt={**port.exempt, (group, name): "a test"})[0].items()
            assert failed == f"{group} {name}"
            assert note.endswith("remove the line")
    assert list(judged(computed, partners={**port.partners, "absent#0": ("head#0", "a test")})[0]) == ["taps absent#0"]


@pytest.mark.parametrize("group", ["taps", "outputs", "losses", "gradients", "tap_gradients"])
@pytest.mark.parametrize("missing", [True, False])
def test_what_one_side_lacks_fails(group, missing, computed):
    groups = dict(computed[-1].groups)
    name = {"taps": "up.0#0", "tap_gradients": "up.0#0", "outputs": "logits", "losses": "loss_ce", "gradients": "up.0.bias"}[group]
    groups[group] = without(groups[group], name) if missing else {**groups[group], "more": groups[group][name]}
    alone = {f"{group} {name}": "no partner in TensorFlow"} if missing else {f"{group} more": "no partner in the trace"}
    if (group, missing) == ("gradients", True):  # in which alone a variable, and the tensor that it comes of, would show
        alone |= {"variables up_0.bias": "shows in gradients 'up.0.bias'", "sources up.0.bias": "shows in variables 'up_0.bias'"}
    assert judged(computed, groups)[0] == alone


def test_every_variable_and_every_source_key_has_a_witness(computed):
    port = computed[0]
    groups = dict(computed[-1].groups)
    groups["taps"] = without(groups["taps"], "down.1.norm#0")
    failures, _ = judged(computed, groups)
    statistics = {"mean": "moving_mean", "var": "moving_variance"}
    assert failures == {
        "taps down.1.norm#0": "no partner in TensorFlow",
        **{f"variables down_1_norm.{name}": "shows in taps 'down.1.norm#0'" for name in statistics.values()},
        **{f"sources down.1.norm.running_{key}": f"shows in variables 'down_1_norm.{name}'" for key, name in statistics.items()},
    }
    exempt = {**port.exempt, ("variables", "down_1_norm.moving_mean"): "a test"}
    failures, exempted = judged(computed, groups, exempt=exempt)
    assert "variables down_1_norm.moving_mean" not in failures
    assert "sources down.1.norm.running_mean" in failures  # it shows nowhere
    assert ("variables", "down_1_norm.moving_mean", "a test") in {(one.group, one.name, one.reason) for one in exempted}


def test_layouts_are_declared_once(computed):
    lines = computed[0].layouts
    for layouts, count in ((lines[:-1], "no lines"), ([*lines, ("up.1#0", lines[0][1])], "2 lines")):
        failures, _ = judged(computed, layouts=layouts)
        assert count in failures["taps up.1#0"]
        assert all(failed.endswith(("shrink.0#0", "shrink.1#0", "up.0#0", "up.1#0")) for failed in failures)
    wrong = [*lines[:-1], (lines[-1][0], Layout("BHWC", "BCWH"))]
    assert "shape" in judged(computed, layouts=wrong)[0]["taps up.1#0"]


def test_inputs_are_brought_into_the_layout_of_tensorflow(computed):
    port = computed[0]
    inputs = port.inputs["one"]()
    tensors = port.tensors(inputs, "float32")
    assert np.array_equal(tensors["image"], inputs["image"].transpose(0, 2, 3, 1).astype(np.float32))
    assert tensors["labels"].dtype == "int64"
    with pytest.raises(TapRuleError, match="no lines for 'more'"):
        port.tensors({"more": np.zeros(1)}, "float32")
    for layout in (Layout("BHWC", "B(HW)C"), Layout("BSC", "BCS")):
        with pytest.raises(TapRuleError, match="does not fit"):
            dataclasses.replace(port, layouts=[("image", layout)]).tensors({"image": inputs["image"]}, "float32")


# Rules and conversion.


def fails(port, *told, **changes):
    with pytest.raises(ConversionError) as error:
        ports.convert(dataclasses.replace(port, **changes), "unet.pth", "tf_unet")
    for words in told:
        assert words in str(error.value)
    assert not Path("tf_unet").exists()


def test_every_source_key_and_every_variable_is_accounted_for(port):
    rules = port.rules
    fails(port, "no rule for 'merge.1.norm.num_batches_tracked'", drops=port.drops[:-1])
    fails(port, "no tensor for the rule 'absent'", drops=[*port.drops, Drop("absent", "a test", None)])
    fails(port, "no rules fill 'head.bias'", rules=rules[:-1])
    fails(port, "2 rules fill 'head.bias'", rules=[*rules, Rule("head.bias", "head.bias")])
    fails(port, "no tensor for the rule 'absent.weight'", rules=[*rules, Rule("absent.weight", "absent.kernel")])
    fails(port, "'head.weight' (5, 4, 1, 1) becomes", rules=[*rules[:-2], Rule("head.weight", "head.kernel", IDENTITY), rules[-1]])


def test_values_that_cannot_be_converted_are_refused(port, monkeypatch):
    tensors = {}
    original = ports.open_source

    @contextlib.contextmanager
    def opened(path):
        with original(path) as file:
            yield dataclasses.replace(file, tensors={**file.tensors, **tensors})

    monkeypatch.setattr(ports, "open_source", opened)
    tensors["head.bias"] = np.full(5, np.nan, np.float32)
    fails(port, "'head.bias' (5,) has values that are not finite")
    tensors["head.bias"] = np.full(5, 0.1)
    fails(port, "'head.bias' is float64, which float32 does not hold exactly")


def test_a_conversion_is_whole_and_replaces_only_its_own(port, capsys):
    manifest = ports.convert(port, "unet.pth", None)
    assert not Path("tf_unet").exists()
    assert manifest == ports.convert(port, "unet.pth", "tf_unet")
    assert {line["target"] for line in manifest["tensors"]} == set(ports.named_variables(port.new("float32")))
    code, text = run("convert --port unet_port.py --src unet.pth --dst tf_unet", capsys)
    assert (code, "add --force" in text) == (2, True)
    assert run("convert --port unet_port.py --src unet.pth --dst tf_unet --force", capsys)[0] == 0
    (Path("tf_unet") / "mine").touch()
    assert run("convert --port unet_port.py --src unet.pth --dst tf_unet --force", capsys)[0] == 2
    model = port.build_tensorflow()
    model.load_weights("tf_unet/model.weights.h5")  # as whoever uses the port does
    assert np.array_equal(model.get_layer("head").bias, port.load("tf_unet", "float64").get_layer("head").bias)
    with pytest.raises(ConversionError, match="is a checkpoint of 'unet', not of 'other'"):
        dataclasses.replace(port, name="other").load("tf_unet", "float32")
    with pytest.raises(ConversionError, match="holds no converted checkpoint"):
        port.load("absent", "float32")


def test_descriptions_that_are_none(capsys):
    Path("empty.py").write_text("")
    Path("broken.py").write_text("import absent_module")
    for name, told in (("empty.py", "it has no PORT"), ("broken.py", "absent_module"), ("absent.py", "cannot read the port 'absent.py'")):
        for command in ("convert --src unet.pth --dry-run", "parity-check --ckpt tf_unet --reference trace"):
            code, text = run(f"{command} --port {name}", capsys)
            assert code == 2
            assert told in text or "no manifest.json" in text
    with pytest.raises(SystemExit):
        run("convert --port unet_port.py --src unet.pth --dry-run --dtype float16", capsys)
    with pytest.raises(SystemExit):
        run("parity-check --port unet_port.py --ckpt tf_unet --reference official --src unet.pth", capsys)


@pytest.mark.parametrize("name", ["with_classes.py", "json.py"])
def test_a_port_may_have_dataclasses(name):
    """Of text annotations, which dataclasses look up in the module; and be called as another module is."""
    lines = ["from __future__ import annotations", "import dataclasses", "@dataclasses.dataclass", "class PORT:", "    n: int = 3"]
    Path(name).write_text("\n".join(lines))
    assert ports.read(name)().n == 3
    assert sys.modules["json"] is json


@pytest.mark.parametrize("line", ["1 / 0", "raise SystemExit(1)", "absent_name", "assert False", "PORT = {}['absent']"])
def test_whatever_goes_wrong_in_a_ports_file_is_told(line):
    Path("wrong_port.py").write_text(line)
    with pytest.raises(ConversionError, match=r"cannot read the port 'wrong_port\.py': "):
        ports.read("wrong_port.py")
    assert not [name for name in sys.modules if "wrong_port" in name]


# Trees of Keras layers.


class Tree(keras.Model):
    """Layers in lists, in dicts, shared, inside others, and one that no attribute leads to."""

    def __init__(self):
        super().__init__()
        self.first = keras.layers.Dense(4)
        self.blocks = [keras.layers.Dense(4, name="any"), keras.Sequential([keras.layers.Dense(4, name="inner")])]
        self.named = {"a": keras.layers.Dense(4)}
        self.attention = keras.layers.MultiHeadAttention(2, 2)
        self.again = self.first
        self.hidden = lambda x, layer=keras.layers.ReLU(name="hidden"): layer(x)  # noqa: B008

    def call(self, x):
        x = self.again(self.first(x))
        for layer in (*self.blocks, self.named["a"]):
            x = layer(x)
        return self.hidden(self.attention(x, x))


def tree_port(**changes):
    layers = (
        "first|blocks.0|blocks.1.inner|named.a|attention._query_dense|attention._key_dense|attention._value_dense|attention._output_dense"
    )
    return Port(
        "tree",
        list,
        Tree,
        lambda model, inputs: {"y": model(inputs["x"])},
        {"one": lambda: {"x": np.ones((2, 3, 4))}},
        [Rule(f"{{layer:{layers}}}.{{name:weight→kernel|bias}}", f"{{layer:{layers}}}.{{name}}")],
        [("{name:x|y}", Layout("BLC", "BLC"))],
        **changes,
    )


def test_names_in_a_tree_of_layers():
    port = tree_port()
    model = port.new("float64")
    assert {variable.dtype for variable in model.weights} == {"float64"}
    layers = [path for path in ports.named_layers(model) if path and not path.startswith("attention.")]
    assert layers == ["first", "blocks.0", "blocks.1", "blocks.1.inner", "named.a", "attention"]
    names = list(ports.named_variables(model))
    assert names[:4] == ["first.kernel", "first.bias", "blocks.0.kernel", "blocks.0.bias"]
    assert len(names) == len(model.weights) == 16
    taps = port.run(model, port.inputs["one"](), "eager").groups["taps"]
    assert {"first#0", "first#1", "blocks.1.inner#0", "attention._query_dense#0", "hidden (no attribute of the model)#0"} <= set(taps)


def test_names_that_are_not_unique_are_refused():
    port = tree_port(modules=[Rule("first", "blocks.0")])
    with pytest.raises(TapRuleError, match=r"'first' and 'blocks\.0' are both called 'first'"):
        port.new("float32")

    class Twice(keras.layers.Layer):
        def build(self, shape):
            self.a, self.b = (self.add_weight((1,), name="same") for _ in range(2))

        def call(self, x):
            return x * self.a * self.b

    layer = Twice()
    layer(np.ones((1, 1), np.float32))
    with pytest.raises(ConversionError, match="two variables are called 'same'"):
        ports.named_variables(layer)


def test_a_weight_that_no_attribute_leads_to_is_refused():
    layer = keras.layers.Dense(2)
    layer.build((None, 2))

    class Holder:
        kept = layer

    class Outer(keras.layers.Layer):
        def __init__(self):
            super().__init__()
            self._layers.append(layer)
            self.holder = Holder()

    with pytest.raises(ConversionError, match="no attribute leads to"):
        ports.named_variables(Outer())
