//! Names and sizes of dtypes.

use tch::Kind;

const NAMES: [(Kind, &str, usize); 10] = [
    (Kind::Float, "float32", 4),
    (Kind::BFloat16, "bfloat16", 2),
    (Kind::Half, "float16", 2),
    (Kind::Double, "float64", 8),
    (Kind::Int64, "int64", 8),
    (Kind::Int, "int32", 4),
    (Kind::Int16, "int16", 2),
    (Kind::Int8, "int8", 1),
    (Kind::Uint8, "uint8", 1),
    (Kind::Bool, "bool", 1),
];

/// The floating-point dtype of a name as Hugging Face writes it (`float32`, `bfloat16`, `float16`, `float64`).
pub fn parse_kind(name: &str) -> Option<Kind> {
    let name = name.strip_prefix("torch.").unwrap_or(name);
    NAMES[..4].iter().find(|(_, n, _)| *n == name).map(|(kind, _, _)| *kind)
}

/// The dtype of a name that [`kind_name`] gives.
pub fn named_kind(name: &str) -> Option<Kind> {
    NAMES.iter().find(|(_, n, _)| *n == name).map(|(kind, _, _)| *kind)
}

/// The name of a dtype.
pub fn kind_name(kind: Kind) -> &'static str {
    NAMES.iter().find(|(k, _, _)| *k == kind).map_or("unsupported", |(_, name, _)| name)
}

/// The bytes of one element; 0 for dtypes that no checkpoint here holds.
pub fn kind_bytes(kind: Kind) -> usize {
    NAMES.iter().find(|(k, _, _)| *k == kind).map_or(0, |(_, _, bytes)| *bytes)
}
