//! Names of dtypes in safetensors files.

use tch::Kind;

const NAMES: [(&str, Kind); 10] = [
    ("F64", Kind::Double),
    ("F32", Kind::Float),
    ("F16", Kind::Half),
    ("BF16", Kind::BFloat16),
    ("I64", Kind::Int64),
    ("I32", Kind::Int),
    ("I16", Kind::Int16),
    ("I8", Kind::Int8),
    ("U8", Kind::Uint8),
    ("BOOL", Kind::Bool),
];

pub(crate) const SUPPORTED: &str = "one of F64, F32, F16, BF16, I64, I32, I16, I8, U8, BOOL";

pub(crate) fn kind_of(name: &str) -> Option<Kind> {
    NAMES.iter().find(|(n, _)| *n == name).map(|(_, kind)| *kind)
}

pub(crate) fn name_of(kind: Kind) -> Option<&'static str> {
    NAMES.iter().find(|(_, k)| *k == kind).map(|(name, _)| *name)
}
