//! Size of a value as DynamoDB counts it.

use aws_sdk_dynamodb::types::AttributeValue;

/// Returns the size in bytes, by the rules of the Amazon DynamoDB Developer Guide, "DynamoDB item
/// sizes and formats".
pub(crate) fn size(value: &AttributeValue) -> usize {
    match value {
        AttributeValue::S(text) => text.len(),
        AttributeValue::N(digits) => digits.len() / 2 + 2,
        AttributeValue::B(bytes) => bytes.as_ref().len(),
        AttributeValue::M(map) => {
            3 + map.iter().map(|(name, value)| name.len() + size(value) + 1).sum::<usize>()
        }
        AttributeValue::L(list) => 3 + list.iter().map(|value| size(value) + 1).sum::<usize>(),
        _ => 1,
    }
}
