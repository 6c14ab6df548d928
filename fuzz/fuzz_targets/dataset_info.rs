#![no_main]

// Libraries that break down on damaged input are caught by the crate; libFuzzer's own hook would take that for a fault. What
// is not caught still ends the program.
libfuzzer_sys::fuzz_target!(init: drop(std::panic::take_hook()), |bytes: &[u8]| lora_data::fuzz::dataset_info(bytes));
