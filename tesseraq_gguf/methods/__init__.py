"""Methods: how the codes and parameters of a block are learned. One file each; each works on any grid it is given."""
