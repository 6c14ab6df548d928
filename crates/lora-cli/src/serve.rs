//! A base with the adapters of the command line beside it.

use crate::failure::usage;
use anyhow::{Context, Result};
use lora_format::AdapterFolder;
use lora_model::{AdapterSet, Decoder};
use std::path::{Path, PathBuf};

/// Adapters by name, each with its weight; empty is the base alone.
pub(crate) type Mix = Vec<(String, f64)>;

/// A model and what stands beside it.
#[derive(Debug)]
pub(crate) struct Served {
    /// The base, with the active adapters in place.
    pub(crate) model: Decoder,
    adapters: AdapterSet,
    /// In the order of the command line.
    names: Vec<String>,
    active: Mix,
}

impl Served {
    /// Puts adapters beside a model and makes all of them active with these weights.
    ///
    /// # Errors
    /// An adapter that does not fit, by its folder, or adapters that cannot be weighted.
    pub(crate) fn new(mut model: Decoder, folders: &[(PathBuf, AdapterFolder)], weights: &[f64]) -> Result<Self> {
        let mut adapters = AdapterSet::default();
        let names = names_of(folders.iter().map(|(path, _)| path.as_path()));
        for (name, (path, folder)) in names.iter().zip(folders) {
            adapters.load(name, folder, &mut model).with_context(|| format!("adapter {}", path.display()))?;
        }
        let mut served = Self { model, adapters, names, active: Vec::new() };
        let weights = weights.iter().copied().chain(std::iter::repeat(1.0));
        let mix: Mix = served.names.iter().cloned().zip(weights).collect();
        served.activate(&mix)?;
        Ok(served)
    }

    /// The names that the adapters go by.
    pub(crate) fn names(&self) -> &[String] {
        &self.names
    }

    /// Makes these adapters the active ones.
    ///
    /// # Errors
    /// A name that is not loaded, or adapters that cannot be weighted.
    pub(crate) fn activate(&mut self, mix: &Mix) -> Result<()> {
        let borrowed: Vec<(&str, f64)> = mix.iter().map(|(name, weight)| (name.as_str(), *weight)).collect();
        self.adapters.activate(&mut self.model, &borrowed)?;
        self.active.clone_from(mix);
        Ok(())
    }

    /// The active adapters.
    pub(crate) fn active(&self) -> &Mix {
        &self.active
    }
}

/// The last parts of paths; with a number where two are alike.
fn names_of<'a>(paths: impl Iterator<Item = &'a Path>) -> Vec<String> {
    let mut names: Vec<String> = Vec::new();
    for path in paths {
        let last = path.file_name().map_or_else(|| path.display().to_string(), |n| n.to_string_lossy().into_owned());
        let mut name = last.clone();
        let mut number = 2;
        while names.contains(&name) {
            name = format!("{last}-{number}");
            number += 1;
        }
        names.push(name);
    }
    names
}

/// `poet`, `poet=0.7 lawyer=0.3`, or `none`.
///
/// # Errors
/// A weight that is no number.
pub(crate) fn parse_mix(text: &str) -> Result<Mix> {
    if text.trim() == "none" {
        return Ok(Vec::new());
    }
    let one = |word: &str| {
        let Some((name, weight)) = word.rsplit_once('=') else { return Ok((word.to_string(), 1.0)) };
        let weight = weight.parse().map_err(|_| usage(format!("{word}: what follows = must be a number")))?;
        Ok((name.to_string(), weight))
    };
    text.split_whitespace().map(one).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn folders_of_one_name_are_told_apart() {
        let paths = ["runs/a/poet", "runs/b/poet", "x/lawyer", "poet"].map(Path::new);
        assert_eq!(names_of(paths.into_iter()), ["poet", "poet-2", "lawyer", "poet-3"]);
    }

    #[test]
    fn mixes_are_read() {
        assert_eq!(parse_mix("poet").unwrap(), [("poet".to_string(), 1.0)]);
        assert_eq!(parse_mix(" poet=0.7  b=-1 ").unwrap(), [("poet".to_string(), 0.7), ("b".to_string(), -1.0)]);
        assert_eq!(parse_mix("none").unwrap(), []);
        assert!(parse_mix("poet=x").is_err());
    }
}
