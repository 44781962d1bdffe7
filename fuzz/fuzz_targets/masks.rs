//! Keep lists and plan.json.
#![no_main]

use std::path::Path;

use depthshrinker::pipeline::Plan;
use depthshrinker::shrink::Mask;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|text: &str| {
    if let Ok(mask) = text.parse::<Mask>() {
        assert_eq!(mask.to_string().parse::<Mask>().expect("what was written can be read"), mask);
    }
    if let Ok(plan) = Plan::parse(Path::new("plan.json"), text) {
        assert!(plan.mask().is_ok());
    }
});
