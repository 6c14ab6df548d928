#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| lora_data::fuzz::parquet(bytes));
