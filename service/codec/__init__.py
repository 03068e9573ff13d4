"""Protobuf to domain and back. Every field of a message is checked, all of them at once."""

from service.codec.attention import AttentionDecoder as AttentionDecoder
from service.codec.attention import attend_response as attend_response
from service.codec.descriptions import load_description as load_description
from service.codec.descriptions import model_description as model_description
from service.codec.planning import MAX_SERVED_OUTPUT_TOKENS as MAX_SERVED_OUTPUT_TOKENS
from service.codec.planning import PlanningCall as PlanningCall
from service.codec.planning import planning_call as planning_call
from service.codec.requests import Call as Call
from service.codec.requests import RequestDecoder as RequestDecoder
from service.codec.responses import embedding as embedding
from service.codec.responses import finished as finished
from service.codec.responses import token_delta as token_delta
from service.codec.responses import token_logprobs as token_logprobs
from service.codec.responses import usage as usage
