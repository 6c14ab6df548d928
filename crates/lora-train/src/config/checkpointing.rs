//! `train.gradient_checkpointing`: what a backward pass finds kept, and what it computes again.

use lora_model::Recompute;
use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

/// What of a forward pass is kept for the backward pass. Every choice gives the same bits.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Checkpointing {
    /// Everything.
    #[default]
    None,
    /// Everything but what norms and gates give, which is computed again: a third less, and no product twice.
    Selective,
    /// The inputs of the blocks; each block is computed again.
    Full,
    /// The same, and the inputs of the blocks wait in the memory of the host. For CUDA devices.
    Offload,
}

impl Checkpointing {
    /// Every choice.
    pub const ALL: [Self; 4] = [Self::None, Self::Selective, Self::Full, Self::Offload];
    /// The words of the choices.
    pub const NAMES: &'static [&'static str] = &["none", "selective", "full", "offload"];

    /// The word, as a configuration and the command line spell it.
    pub fn name(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Selective => "selective",
            Self::Full => "full",
            Self::Offload => "offload",
        }
    }

    /// Whether what norms and gates give is computed again.
    pub fn remakes(self) -> bool {
        self == Self::Selective
    }

    /// Whether every block is computed again.
    pub fn recomputes(self) -> bool {
        matches!(self, Self::Full | Self::Offload)
    }

    /// Whether what the blocks read waits on the host.
    pub fn offloads(self) -> bool {
        self == Self::Offload
    }

    /// The blocks that are computed again as a whole: all, or so many of them (`train.recompute_layers`).
    pub fn recompute(self, layers: u32) -> Recompute {
        if self.recomputes() { Recompute::ALL } else { Recompute(layers as usize) }
    }

    /// From its word.
    pub fn named(word: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|choice| choice.name() == word)
    }
}

// None and all were false and true once; they are written so still, that configurations of before stay equal to their runs'.
impl Serialize for Checkpointing {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::Selective | Self::Offload => serializer.serialize_str(self.name()),
            _ => serializer.serialize_bool(*self == Self::Full),
        }
    }
}

impl<'de> Deserialize<'de> for Checkpointing {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let value = toml::Value::deserialize(deserializer)?;
        let known = match &value {
            toml::Value::Boolean(all) => Some(if *all { Self::Full } else { Self::None }),
            toml::Value::String(word) => Self::named(word),
            _ => None,
        };
        known.ok_or_else(|| {
            de::Error::custom(format!(
                "must be true, false, \"none\", \"selective\", \"full\" or \"offload\", got {value}"
            ))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn old_and_new_words_say_the_same() {
        let read = |text: &str| text.parse::<toml::Table>().unwrap()["x"].clone().try_into::<Checkpointing>();
        for (text, wanted) in [
            ("x = true", Checkpointing::Full),
            ("x = \"full\"", Checkpointing::Full),
            ("x = \"selective\"", Checkpointing::Selective),
            ("x = \"none\"", Checkpointing::None),
            ("x = \"offload\"", Checkpointing::Offload),
            ("x = false", Checkpointing::None),
        ] {
            assert_eq!(read(text).unwrap(), wanted, "{text}");
        }
        let told = read("x = \"some\"").unwrap_err().to_string();
        assert!(told.contains("selective") && told.contains("some"), "{told}");
    }
}
