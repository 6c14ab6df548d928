//! The files of a model folder that go along with its weights: tokenizer, templates, generation settings, licence.

use crate::error::{Error, Result};
use std::fs;
use std::path::{Path, PathBuf};

const EXTENSIONS: [&str; 5] = ["json", "jinja", "txt", "model", "tiktoken"];
const TEMPLATES: &str = "additional_chat_templates";

/// The files to copy, relative to the model's folder, in the order of their names.
///
/// `config.json` and the index are not among them: they may have to change. Scripts are never copied.
pub(crate) fn list(dir: &Path) -> Result<Vec<PathBuf>> {
    let mut files: Vec<PathBuf> = names_in(dir)?
        .into_iter()
        .filter(|name| goes_along(name) && dir.join(name).is_file())
        .map(PathBuf::from)
        .collect();
    let templates = dir.join(TEMPLATES);
    if templates.is_dir() {
        let names = names_in(&templates)?.into_iter().filter(|name| name.ends_with(".jinja"));
        files.extend(names.map(|name| Path::new(TEMPLATES).join(name)));
    }
    files.sort();
    Ok(files)
}

/// Copies the listed files and makes them durable.
pub(crate) fn copy(files: &[PathBuf], from: &Path, to: &Path) -> Result<()> {
    for file in files {
        let target = to.join(file);
        let fail = |e| Error::io("copy to", &target, e);
        if let Some(parent) = target.parent() {
            fs::create_dir_all(parent).map_err(fail)?;
        }
        fs::copy(from.join(file), &target).map_err(fail)?;
        fs::File::open(&target).and_then(|f| f.sync_all()).map_err(fail)?;
    }
    Ok(())
}

fn names_in(dir: &Path) -> Result<Vec<String>> {
    let fail = |e| Error::io("read", dir, e);
    let mut names = Vec::new();
    for entry in fs::read_dir(dir).map_err(fail)? {
        if let Ok(name) = entry.map_err(fail)?.file_name().into_string() {
            names.push(name);
        }
    }
    Ok(names)
}

fn goes_along(name: &str) -> bool {
    let ours = ["config.json", crate::provenance::FILE, "adapter_config.json"];
    if name.starts_with('.') || name.ends_with(".index.json") || ours.contains(&name) {
        return false;
    }
    let licence = ["LICENSE", "LICENCE", "NOTICE", "USE_POLICY"].iter().any(|start| name.starts_with(start));
    licence || Path::new(name).extension().is_some_and(|e| EXTENSIONS.iter().any(|known| e == *known))
}
