"""What every parameter is, as its modules declare it; no name is interpreted."""

from __future__ import annotations

from torch import nn

from sambay.layers.roles import Role


def halved_parameters(model: nn.Module) -> set[str]:
    """The parameters whose rows are two matrices, one below the other, as modules declare them."""
    return {
        f"{prefix}.{path}" if prefix else path
        for prefix, module in model.named_modules()
        for path in getattr(module, "halves", ())
    }


def parameter_roles(model: nn.Module) -> dict[str, Role]:
    """The role of each entry of `model.named_parameters()`, by its name."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    roles: dict[str, Role] = {}
    for module in model.modules():
        for path, role in getattr(module, "roles", {}).items():
            owner_path, _, attribute = path.rpartition(".")
            parameter = getattr(module.get_submodule(owner_path), attribute)
            if parameter is not None:  # a Linear without bias
                roles.setdefault(names[id(parameter)], role)  # a tied head is the embedding
    missing = set(names.values()) - roles.keys()
    assert not missing, f"parameters without a declared role: {sorted(missing)}"
    return {name: roles[name] for name in names.values()}
