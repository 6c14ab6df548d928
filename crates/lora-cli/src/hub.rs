//! Where datasets that were fetched and tokens that were made are kept, by what the environment says.

use lora_data::HubId;
use lora_train::RunConfig;
use lora_train::config::Cache;
use std::path::PathBuf;

/// Fills in the folders that the configuration does not name: of tokens, and of the hub where a dataset of it is named.
pub(crate) fn find_caches(config: &mut RunConfig) {
    let data = &mut config.data;
    if data.cache_dir.is_none() && data.cache != Cache::Never {
        data.cache_dir = token_folder();
    }
    let mut sources = data.train.iter().chain(&data.eval);
    let wanted = data.hub_cache.is_none()
        && sources.any(|s| HubId::is_hub(&s.path) || s.path.to_string_lossy().contains("dataset_info.json"));
    if wanted {
        data.hub_cache = cache(set);
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
    let home =
        || Some(variable("XDG_CACHE_HOME").or_else(|| Some(variable("HOME")?.join(".cache")))?.join("huggingface"));
    variable("HF_HUB_CACHE")
        .or_else(|| variable("HUGGINGFACE_HUB_CACHE"))
        .or_else(|| Some(variable("HF_HOME").or_else(home)?.join("hub")))
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
    fn tokens_lie_in_the_users_cache() {
        let with = |set: &[(&str, &str)]| {
            tokens(|name| set.iter().find(|(known, _)| *known == name).map(|(_, value)| PathBuf::from(value)))
        };
        assert_eq!(with(&[("XDG_CACHE_HOME", "/d"), ("HOME", "/c")]), Some("/d/lora/tokens".into()));
        assert_eq!(with(&[("XDG_CACHE_HOME", "d"), ("HOME", "/c")]), Some("/c/.cache/lora/tokens".into()));
        assert_eq!(with(&[]), None);
    }
}
