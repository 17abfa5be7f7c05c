"""What a user reads: every node is described, translated and documented."""

import json
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def english(schema) -> dict:
    """A node's entry of locales/en/nodeDefs.json, from its schema."""
    entry = {"display_name": schema.display_name, "description": schema.description}
    if schema.inputs:
        entry["inputs"] = {i.id: {"name": i.display_name or i.id, "tooltip": i.tooltip} for i in schema.inputs}
    entry["outputs"] = {
        str(n): {"name": output.display_name or output.get_io_type(), "tooltip": output.tooltip}
        for n, output in enumerate(schema.outputs)
    }
    return entry


@pytest.fixture(scope="module")
def schemas(nodes):
    return {name: node.GET_SCHEMA() for name, node in nodes.items()}


def test_pack_adds_little_to_the_hosts_start(pack):
    assert pack.import_seconds < 0.5


def test_nodes_are_found_under_our_name(schemas):
    assert len(schemas) >= 5
    for name, schema in schemas.items():
        assert name.startswith("SelfForcing")
        assert schema.category == "Self Forcing"
        assert schema.search_aliases and schema.description


def test_every_input_and_output_says_what_it_is(schemas):
    for name, schema in schemas.items():
        for slot in [*schema.inputs, *schema.outputs]:
            assert slot.tooltip, f"{name}.{slot.id}"


def test_types_are_comfyuis_own(schemas):
    wires = {"MODEL", "CLIP", "VAE", "CONDITIONING", "LATENT", "SAMPLER", "SIGMAS", "IMAGE", "VIDEO"}
    native = wires | {"INT", "FLOAT", "STRING", "BOOLEAN", "COMBO"}
    for schema in schemas.values():
        assert {slot.get_io_type() for slot in [*schema.inputs, *schema.outputs]} <= native


def test_english_definitions_are_those_of_the_schema(schemas):
    written = json.loads((ROOT / "locales" / "en" / "nodeDefs.json").read_text(encoding="utf-8"))
    assert written == {name: english(schema) for name, schema in sorted(schemas.items())}


def test_every_node_has_a_help_page_that_names_its_inputs(schemas):
    for name, schema in schemas.items():
        page = (ROOT / "web" / "docs" / f"{name}.md").read_text(encoding="utf-8")
        assert page.startswith(f"# {schema.display_name}")
        for slot in schema.inputs:
            assert f"**{slot.display_name or slot.id}**" in page, f"{name}.md does not explain {slot.id}"
