//! Where the hub is, and where what was fetched of it and tokens that were made are kept, by what the environment says.

use crate::failure::usage;
use anyhow::Result;
use lora_data::HubId;
use lora_hub::{Proxy, Settings, Token};
use lora_train::RunConfig;
use lora_train::config::Cache;
use std::path::{Path, PathBuf};

/// Fills in the folders that the configuration does not name: of tokens, and of the hub where something of it is named.
pub(crate) fn find_caches(config: &mut RunConfig) {
    let data = &mut config.data;
    if data.cache_dir.is_none() && data.cache != Cache::Never {
        data.cache_dir = token_folder();
    }
    let mut sources = data.train.iter().chain(&data.eval).chain(&data.replay);
    let of_hub = HubId::is_hub(Path::new(&config.model.path))
        || sources.any(|s| HubId::is_hub(&s.path) || s.path.to_string_lossy().contains("dataset_info.json"));
    if data.hub_cache.is_none() && of_hub {
        data.hub_cache = cache(set);
    }
}

/// How the hub is reached, with the cache in `folder` or where the environment says.
///
/// # Errors
/// Variables that mean nothing, and no folder for the cache.
pub(crate) fn settings(folder: Option<&Path>) -> Result<Settings> {
    let folder = folder.map(Path::to_path_buf).or_else(|| cache(set));
    let folder =
        folder.ok_or_else(|| usage("there is no home folder for the hub's cache; name one with HF_HUB_CACHE"))?;
    let mut settings = reached(set, folder)?;
    settings.proxy = Proxy::try_from_env();
    Ok(settings)
}

/// The settings, by the variables that `huggingface_hub` reads.
fn reached(variable: impl Fn(&str) -> Option<PathBuf>, folder: PathBuf) -> Result<Settings> {
    let text = |name: &str| variable(name).map(|value| value.to_string_lossy().into_owned());
    let yes = |name: &str| text(name).is_some_and(|v| ["1", "on", "yes", "true"].contains(&v.to_lowercase().as_str()));
    let mut settings = Settings::new(folder);
    if let Some(endpoint) = text("HF_ENDPOINT") {
        settings.endpoint = endpoint;
    }
    settings.offline = yes("HF_HUB_OFFLINE") || yes("TRANSFORMERS_OFFLINE");
    let file = variable("HF_TOKEN_PATH").or_else(|| Some(home(&variable)?.join("token")));
    let in_file = || std::fs::read_to_string(file?).ok().filter(|token| !token.trim().is_empty());
    let token = text("HF_TOKEN").or_else(|| text("HUGGING_FACE_HUB_TOKEN")).or_else(in_file);
    settings.token = token.map(|token| Token::new(&token)).transpose()?;
    settings.ca_file = ["SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"].iter().find_map(|name| variable(name));
    Ok(settings)
}

/// The last part of a model's name: that of its folder, or of the repository whose snapshot the folder is.
pub(crate) fn model_name(folder: &Path) -> Option<String> {
    let repository = folder.parent().filter(|up| up.ends_with("snapshots")).and_then(Path::parent);
    let of_hub = repository.and_then(|path| path.file_name()?.to_str()?.strip_prefix("models--"));
    match of_hub {
        Some(name) => name.rsplit("--").next().map(str::to_owned),
        None => folder.file_name().map(|name| name.to_string_lossy().into_owned()),
    }
}

/// The folder of tokens where nothing else is said.
pub(crate) fn token_folder() -> Option<PathBuf> {
    tokens(set)
}

fn set(name: &str) -> Option<PathBuf> {
    std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from)
}

/// The folder, by the variables for such folders.
fn tokens(variable: impl Fn(&str) -> Option<PathBuf>) -> Option<PathBuf> {
    // The rule for these folders is that a relative one is none.
    let named = variable("XDG_CACHE_HOME").filter(|path| path.is_absolute());
    Some(named.or_else(|| Some(variable("HOME")?.join(".cache")))?.join("lora/tokens"))
}

/// The folder, by the variables that `huggingface_hub` reads, in its order.
fn cache(variable: impl Fn(&str) -> Option<PathBuf>) -> Option<PathBuf> {
    variable("HF_HUB_CACHE")
        .or_else(|| variable("HUGGINGFACE_HUB_CACHE"))
        .or_else(|| Some(home(&variable)?.join("hub")))
}

/// The folder of the hub's own tools.
fn home(variable: &impl Fn(&str) -> Option<PathBuf>) -> Option<PathBuf> {
    let usual =
        || Some(variable("XDG_CACHE_HOME").or_else(|| Some(variable("HOME")?.join(".cache")))?.join("huggingface"));
    variable("HF_HOME").or_else(usual)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn variables_are_read_in_the_order_of_the_hubs_own_tools() {
        let with = |set: &[(&str, &str)]| {
            cache(|name| set.iter().find(|(known, _)| *known == name).map(|(_, value)| PathBuf::from(value)))
        };
        assert_eq!(with(&[("HF_HUB_CACHE", "/a"), ("HF_HOME", "/b")]), Some("/a".into()));
        assert_eq!(with(&[("HF_HOME", "/b"), ("HOME", "/c")]), Some("/b/hub".into()));
        assert_eq!(with(&[("HOME", "/c")]), Some("/c/.cache/huggingface/hub".into()));
        assert_eq!(with(&[("XDG_CACHE_HOME", "/d"), ("HOME", "/c")]), Some("/d/huggingface/hub".into()));
        assert_eq!(with(&[]), None);
    }

    #[test]
    fn the_hub_is_where_the_variables_say() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("token"), "hf_file\n").unwrap();
        let with = |set: &[(&str, &str)]| {
            let home = |name: &str| (name == "HF_HOME").then(|| dir.path().to_path_buf());
            let known =
                |name: &str| set.iter().find(|(known, _)| *known == name).map(|(_, value)| PathBuf::from(value));
            reached(|name| known(name).or_else(|| home(name)), "cache".into())
        };
        let usual = with(&[]).unwrap();
        assert_eq!((usual.offline, usual.token.is_some(), usual.endpoint.starts_with("https://")), (false, true, true));
        let other =
            with(&[("HF_ENDPOINT", "http://mirror"), ("HF_HUB_OFFLINE", "1"), ("SSL_CERT_FILE", "ca.pem")]).unwrap();
        assert_eq!(
            (other.offline, other.endpoint.as_str(), other.ca_file),
            (true, "http://mirror", Some("ca.pem".into()))
        );
        assert!(!with(&[("HF_HUB_OFFLINE", "0")]).unwrap().offline);
        let refused = with(&[("HF_TOKEN", "hf planted")]).unwrap_err().to_string();
        assert!(refused.contains("HF_TOKEN") && !refused.contains("planted"), "{refused}");
    }

    #[test]
    fn a_snapshot_has_the_name_of_its_repository() {
        let name = |path: &str| model_name(Path::new(path));
        assert_eq!(name("/c/models--a--base-1B/snapshots/0123").as_deref(), Some("base-1B"));
        assert_eq!(name("models/base").as_deref(), Some("base"));
    }

    #[test]
    fn tokens_lie_in_the_users_cache() {
        let with = |set: &[(&str, &str)]| {
            tokens(|name| set.iter().find(|(known, _)| *known == name).map(|(_, value)| PathBuf::from(value)))
        };
        assert_eq!(with(&[("XDG_CACHE_HOME", "/d"), ("HOME", "/c")]), Some("/d/lora/tokens".into()));
        assert_eq!(with(&[("XDG_CACHE_HOME", "d"), ("HOME", "/c")]), Some("/c/.cache/lora/tokens".into()));
        assert_eq!(with(&[]), None);
    }
}
