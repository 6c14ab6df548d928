//! Where the hub's tools keep the datasets that they fetched.

use lora_data::HubId;
use lora_train::RunConfig;
use std::path::PathBuf;

/// Fills in the cache's folder where a dataset of the hub is named and the configuration does not say where it lies.
pub(crate) fn find_cache(config: &mut RunConfig) {
    let data = &mut config.data;
    let mut sources = data.train.iter().chain(&data.eval);
    let wanted = data.hub_cache.is_none()
        && sources.any(|s| HubId::is_hub(&s.path) || s.path.to_string_lossy().contains("dataset_info.json"));
    if wanted {
        data.hub_cache = cache(|name| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from));
    }
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
}
