//! Keep lists and plan.json.
#![no_main]

use std::path::Path;

use depthshrinker::shrink::{Mask, Selection};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|text: &str| {
    if let Ok(mask) = text.parse::<Mask>() {
        assert_eq!(mask.to_string().parse::<Mask>().expect("what was written can be read"), mask);
    }
    if let Ok(selection) = Selection::parse(Path::new("plan.json"), text) {
        let written = serde_json::to_string(&selection).expect("it came from JSON");
        let again = Selection::parse(Path::new("plan.json"), &written).expect("what was written can be read");
        assert_eq!(again.keep, selection.keep);
    }
});
