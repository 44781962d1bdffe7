//! Settings as TOML.
#![no_main]

use depthshrinker::config::Config;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|text: &str| {
    if let Ok(config) = Config::parse(text) {
        let _ = config.check();
        let echo = config.to_toml().expect("what was read can be written");
        assert_eq!(Config::parse(&echo).expect("what was written can be read").to_toml().expect("again"), echo);
    }
});
