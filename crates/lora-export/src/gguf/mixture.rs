//! What the name of a GGUF file's type means: the type of most matrices, and which of them get another one.

use lora_format::GgufType;

/// A type of GGUF files by llama.cpp's name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum GgufFileType {
    /// All matrices of one type: `f32`, `f16`, `bf16`, `q8_0`, `q4_0`, `q6_k`.
    Plain(GgufType),
    /// `q4_k_m`: `Q4_K`, with `Q6_K` for the head, and for values and down projections of half of the layers.
    Q4KM,
    /// `q5_k_m`: the same over `Q5_K`.
    Q5KM,
}

/// The names that there are, and llama.cpp's numbers for them.
const NAMES: [(&str, GgufFileType, u32); 8] = [
    ("f32", GgufFileType::Plain(GgufType::F32), 0),
    ("f16", GgufFileType::Plain(GgufType::F16), 1),
    ("bf16", GgufFileType::Plain(GgufType::BF16), 32),
    ("q8_0", GgufFileType::Plain(GgufType::Q8_0), 7),
    ("q6_k", GgufFileType::Plain(GgufType::Q6K), 18),
    ("q5_k_m", GgufFileType::Q5KM, 17),
    ("q4_k_m", GgufFileType::Q4KM, 15),
    ("q4_0", GgufFileType::Plain(GgufType::Q4_0), 2),
];

/// What the rules look at besides a tensor's name and shape.
#[derive(Debug, Clone, Copy)]
pub(super) struct Sizes {
    pub(super) layers: i64,
    pub(super) experts: i64,
    /// The head is the embedding.
    pub(super) tied: bool,
    /// Llama of 80 layers whose heads share keys and values.
    pub(super) llama_70b: bool,
}

impl GgufFileType {
    /// The names of all types, widest first.
    pub fn names() -> Vec<&'static str> {
        NAMES.iter().map(|(name, ..)| *name).collect()
    }

    /// The type of a name; `None` for one that there is not.
    pub fn named(name: &str) -> Option<Self> {
        NAMES.iter().find(|(n, ..)| *n == name).map(|(_, kind, _)| *kind)
    }

    /// Its name.
    pub fn name(self) -> &'static str {
        NAMES.iter().find(|(_, kind, _)| *kind == self).map_or("", |(name, ..)| name)
    }

    /// llama.cpp's number of a mostly-so-stored file.
    pub(super) fn id(self) -> u32 {
        NAMES.iter().find(|(_, kind, _)| *kind == self).map_or(1, |(.., id)| *id)
    }

    /// The type of most matrices.
    pub(super) fn most(self) -> GgufType {
        match self {
            Self::Plain(kind) => kind,
            Self::Q4KM => GgufType::Q4K,
            Self::Q5KM => GgufType::Q5K,
        }
    }

    /// The type that a tensor is meant to have, and the one that its rows allow.
    pub(super) fn of(self, name: &str, shape: &[i64], sizes: &Sizes) -> (GgufType, GgufType) {
        // Vectors, tables that are added to others, and routers stay as llama.cpp computes with them.
        if shape.len() < 2 || name.starts_with("position_embd") || name.ends_with("ffn_gate_inp.weight") {
            return (GgufType::F32, GgufType::F32);
        }
        let columns = shape.last().copied().unwrap_or(1);
        let wanted = self.wanted(name, sizes);
        (wanted, fallback(wanted, columns))
    }

    fn wanted(self, name: &str, sizes: &Sizes) -> GgufType {
        let most = self.most();
        let mixed = !matches!(self, Self::Plain(_));
        let (layer, part) = match name.strip_prefix("blk.").and_then(|rest| rest.split_once('.')) {
            Some((number, part)) => (number.parse().unwrap_or(0), part),
            None => (0, name),
        };
        let is =
            |what: &str| part.strip_prefix(what).is_some_and(|rest| rest.starts_with('.') || rest == "_exps.weight");
        if is("output") || (is("token_embd") && sizes.tied) {
            return match most {
                GgufType::Q4_0 => GgufType::Q8_0,
                kind if kind.block() > 32 => GgufType::Q6K,
                kind => kind,
            };
        }
        if most == GgufType::Q4_0 && is("token_embd") {
            return GgufType::Q8_0;
        }
        // Eight experts share attention weights that are small beside theirs.
        let eight = sizes.experts == 8 && most.block() > 32;
        if is("attn_v") || is("attn_qkv") {
            return match most {
                _ if eight => GgufType::Q8_0,
                _ if mixed && more_bits(layer, sizes.layers) => GgufType::Q6K,
                GgufType::Q4K if sizes.llama_70b => GgufType::Q5K,
                kind => kind,
            };
        }
        match most {
            _ if eight && is("attn_k") => GgufType::Q8_0,
            GgufType::Q4K if eight && is("attn_output") => GgufType::Q5K,
            _ if mixed && is("ffn_down") && more_bits(layer, sizes.layers) => GgufType::Q6K,
            kind => kind,
        }
    }
}

/// The first and the last eighth of the layers, and every third between them.
fn more_bits(layer: i64, layers: i64) -> bool {
    layer < layers / 8 || layer >= 7 * layers / 8 || (layer - layers / 8) % 3 == 2
}

/// What llama.cpp takes for rows that a type cannot hold.
fn fallback(wanted: GgufType, columns: i64) -> GgufType {
    if wanted.fits(columns) {
        return wanted;
    }
    let small = match wanted {
        GgufType::Q4K => GgufType::Q5_0,
        GgufType::Q5K => GgufType::Q5_1,
        GgufType::Q6K => GgufType::Q8_0,
        other => other,
    };
    if small.fits(columns) { small } else { GgufType::F16 }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SIZES: Sizes = Sizes { layers: 32, experts: 0, tied: false, llama_70b: false };

    fn stored(kind: GgufFileType, name: &str, columns: i64, sizes: &Sizes) -> &'static str {
        kind.of(name, &[8, columns], sizes).1.name()
    }

    #[test]
    fn a_file_of_q4_k_m_has_the_types_that_the_name_means() {
        let of = |name: &str| stored(GgufFileType::Q4KM, name, 4096, &SIZES);
        assert_eq!((of("output.weight"), of("token_embd.weight")), ("q6_k", "q4_k"));
        assert_eq!((of("blk.0.attn_q.weight"), of("blk.0.attn_output.weight")), ("q4_k", "q4_k"));
        // As llama-quantize gives them for 32 layers.
        let six: Vec<i64> = (0..32).filter(|i| of(&format!("blk.{i}.ffn_down.weight")) == "q6_k").collect();
        assert_eq!(six, [0, 1, 2, 3, 6, 9, 12, 15, 18, 21, 24, 27, 28, 29, 30, 31]);
        let values: Vec<i64> = (0..32).filter(|i| of(&format!("blk.{i}.attn_v.weight")) == "q6_k").collect();
        assert_eq!(values, six);
        let five = |name: &str| stored(GgufFileType::Q5KM, name, 4096, &SIZES);
        assert_eq!((five("blk.0.attn_v.weight"), five("blk.4.attn_v.weight")), ("q6_k", "q5_k"));
    }

    #[test]
    fn ties_experts_and_many_layers_change_it() {
        let tied = Sizes { tied: true, ..SIZES };
        assert_eq!(stored(GgufFileType::Q4KM, "token_embd.weight", 4096, &tied), "q6_k");
        let eight = Sizes { experts: 8, ..SIZES };
        let of = |name: &str| stored(GgufFileType::Q4KM, name, 4096, &eight);
        assert_eq!((of("blk.5.attn_v.weight"), of("blk.5.attn_k.weight")), ("q8_0", "q8_0"));
        assert_eq!((of("blk.5.attn_output.weight"), of("blk.5.attn_q.weight")), ("q5_k", "q4_k"));
        assert_eq!((of("blk.0.ffn_down_exps.weight"), of("blk.4.ffn_down_exps.weight")), ("q6_k", "q4_k"));
        assert_eq!(of("blk.0.ffn_gate_inp.weight"), "f32");
        let large = Sizes { layers: 80, llama_70b: true, ..SIZES };
        assert_eq!(stored(GgufFileType::Q4KM, "blk.11.attn_v.weight", 4096, &large), "q5_k");
    }

    #[test]
    fn rows_that_do_not_fit_have_the_type_that_llama_cpp_takes() {
        let of = |kind, name: &str, columns| stored(kind, name, columns, &SIZES);
        assert_eq!(of(GgufFileType::Q4KM, "blk.5.ffn_up.weight", 896), "q5_0");
        assert_eq!(of(GgufFileType::Q5KM, "blk.5.ffn_up.weight", 896), "q5_1");
        assert_eq!(of(GgufFileType::Q4KM, "blk.0.ffn_down.weight", 896), "q8_0");
        assert_eq!(of(GgufFileType::Q4KM, "output.weight", 896), "q8_0");
        assert_eq!(of(GgufFileType::Q4KM, "blk.5.ffn_up.weight", 80), "f16");
        assert_eq!(of(GgufFileType::Plain(GgufType::Q4_0), "blk.5.ffn_up.weight", 80), "f16");
        assert_eq!(of(GgufFileType::Plain(GgufType::Q4_0), "token_embd.weight", 64), "q8_0");
        assert_eq!(of(GgufFileType::Plain(GgufType::F16), "output.weight", 80), "f16");
    }

    #[test]
    fn names_are_found_again() {
        for name in GgufFileType::names() {
            assert_eq!(GgufFileType::named(name).unwrap().name(), name);
        }
        assert_eq!(GgufFileType::named("q9"), None);
    }
}
